"""A model split over a mesh: planned and checked, tried in the lab without any device, saved, and run by ranks.

    plan = shard_model("gpt2", "tp=2,dp=2", recipe="megatron")
    print(plan)                                     # where everything lies, where ranks meet, and why
    plan = shard_model(model, "tp=4", axes={"heads": "tp", "vocab": "tp"})

plans.py            the plan, and the programs of ranks
needs.py            what one device holds, and how long it works
lab_trials.py       all ranks in this process, held against the whole model
sharded_models.py   plan and weights in one file
rank_models.py      one rank's part, compiled and loaded by a process of its own
"""

from treadle.sharding.lab_trials import LabTrial, try_in_lab
from treadle.sharding.needs import DeviceNeeds, device_needs
from treadle.sharding.plans import plan_graph, rank_graph, recognized, shard_model

__all__ = [
    "DeviceNeeds",
    "LabTrial",
    "device_needs",
    "plan_graph",
    "rank_graph",
    "recognized",
    "shard_model",
    "try_in_lab",
]
