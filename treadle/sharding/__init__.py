"""Models that are split over a mesh: planned, checked, simulated without any device, saved, and run by ranks.

    plan = shard_model("gpt2", "tp=2,dp=2", recipe="megatron")
    print(plan)                                     # placements, collectives, and the reasons
    plan = shard_model(model, "tp=4", axes={"heads": "tp", "vocab": "tp"})

plans.py            the plan, and the programs of ranks
needs.py            memory and time of one device
lab_trials.py       all ranks simulated in this process, compared with the unsplit model
sharded_models.py   plan and weights in one file
rank_models.py      one rank's part, compiled and loaded by its own process
"""

from treadle.sharding.lab_trials import LabTrial, try_in_lab
from treadle.sharding.needs import DeviceNeeds, device_needs
from treadle.sharding.plans import plan_graph, rank_graph, shard_model

__all__ = [
    "DeviceNeeds",
    "LabTrial",
    "device_needs",
    "plan_graph",
    "rank_graph",
    "shard_model",
    "try_in_lab",
]
