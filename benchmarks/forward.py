"""Forward passes compared with other tools, as ratios: each side in a process of its own, in turns (`treadle bench`).

    python benchmarks/forward.py [--only bert,minilm] [--threads 1] [--dtype f32|bf16|int8] [--python PATH] [--json]

`--dtype` is our precision: float32; products and attention in bf16; or weights and their operands rounded to 8 bits,
and attention in bf16. The peers are the usual alternatives, for bf16 and int8 in the same precision. Weights are drawn,
because times do not depend on them. Outputs are compared first. On one thread times are CPU times, which other
processes do not lengthen. The machine's line is the time of our kernels if each ran at the peak multiplication rate of
the machine's unit, or at its memory bandwidth. Models that CTranslate2 supports are given to all sides as a Hugging
Face folder, which CTranslate2 reads. `--python` names the Python that has onnxruntime, openvino, nncf and ctranslate2.
A peer that is missing, or cannot run a row, is named.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A model of the zoo, a family or a file with its function, at these sizes."""

    family: str
    config: tuple[str, ...]
    sizes: dict[str, int]


MODELS = Path(__file__).parents[1] / "models"
_MINILM = ("dim=384", "layers=6", "hidden=1536")
_LLAMA = ("vocab=49152", "dim=576", "heads=9", "kv_heads=3", "layers=30", "hidden=1536", "tied=true")

ROWS = {
    "bert": Row("bert", (), {"B": 1, "S": 128}),
    "bert-8": Row("bert", (), {"B": 8, "S": 128}),
    "minilm": Row("bert", _MINILM, {"B": 32, "S": 64}),
    "vit": Row("vit", (), {"B": 1}),
    "gpt2": Row("gpt2", (), {"B": 1, "S": 512}),
    "t5": Row(f"{MODELS / 't5.py'}:t5_encoder", (), {"B": 1, "S": 128}),
    "llama": Row("llama", _LLAMA, {"B": 1, "S": 256}),
    "vit-classifier": Row("vit", ("head=classifier",), {"B": 1}),
    "reranker": Row("bert", (*_MINILM, "head=classifier"), {"B": 32, "S": 64}),
}
_OF_BERT = {"position_embedding_type": "absolute"}  # required by CTranslate2
_OF_LLAMA = {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536}
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", _OF_BERT),
    "bert-8": ("BertModel", _OF_BERT),
    "minilm": ("BertModel", {**_OF_BERT, "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "llama": (
        "LlamaForCausalLM",
        {**_OF_LLAMA, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
}
"""The same models as Hugging Face classes with their configurations, if CTranslate2 supports them."""
PEERS = {
    "f32": ("eager", "onnxruntime", "openvino", "ctranslate2"),
    "bf16": ("openvino", "openvino-bf16"),
    "int8": ("onnxruntime-int8", "openvino-bf16", "openvino-int8", "ctranslate2-int8"),
}
WAYS: dict[str, dict[str, str]] = {"f32": {}, "bf16": {"dtype": "bf16"}, "int8": {"quantize": "int8", "dtype": "bf16"}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(ROWS), help="rows, separated by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=tuple(PEERS), default="f32")
    parser.add_argument("--against", help="peers in place of the dtype's, separated by commas")
    parser.add_argument("--backend", default="tvm")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if unknown := [name for name in options.only.split(",") if name not in ROWS]:
        parser.error(f"there is no row {unknown[0]!r}: " + ", ".join(ROWS))
    against = options.against.split(",") if options.against else PEERS[options.dtype]
    found = []
    for name in options.only.split(","):
        measured = measure(options, name, against)
        found.append(measured)
        if not options.json:
            show(options, name, measured)
    if options.json:
        print(json.dumps(found))
    return 0


def measure(options: argparse.Namespace, name: str, against: Any) -> dict[str, Any]:
    """Return one row, as from `treadle bench --json`."""
    from treadle.benching.benchmark import bench_model
    from treadle.benching.workload import Workload
    from treadle.program.flag_values import parse_config

    row, way = ROWS[name], WAYS[options.dtype]
    with tempfile.TemporaryDirectory() as place:
        model, config = row.family, row.config
        if name in FOLDERS and any(peer.startswith("ctranslate2") for peer in against):
            model, config = write_folder(name, place), ()
        chosen = {**way, "backend": options.backend, "config": parse_config(config, ())}
        workload = Workload(model, options.threads, chosen)
        made = bench_model(workload, against, sizes=row.sizes, rounds=options.rounds, python=options.python)
    return {"row": name, **made.as_dict()}


def write_folder(name: str, place: str) -> str:
    """Write a Hugging Face folder with a row's model and drawn weights."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kind, settings = FOLDERS[name]
    model = getattr(transformers, kind)
    model(model.config_class(**settings)).eval().save_pretrained(place)
    return place


def show(options: argparse.Namespace, name: str, measured: dict[str, Any]) -> None:
    sizes = ", ".join(f"{symbol}={size}" for symbol, size in measured["sizes"].items())
    print(f"{name} ({sizes}), ours in {options.dtype}, {options.threads} thread{'s' * (options.threads > 1)}")
    for side in measured["rows"]:
        ratio = f"{1 / side['times_ours']:6.2f} of it is ours" if side["side"] != "treadle" else ""
        apart = "" if side["difference"] is None else f"   differs by {float(side['difference']):.1e}"
        print(f"  {side['side']:18} {side['seconds'] * 1e3:8.1f} ms  {ratio:20}{apart}".rstrip())
    machine = measured["machine"]
    least = machine["least_seconds"]
    rates = ", ".join(f"{rate / 1e9:.0f} G/s in {dtype}" for dtype, rate in machine["flops_per_second"].items())
    read = machine["bytes_per_second"] / 1e9
    ratio = f"{measured['rows'][0]['seconds'] / least:6.2f} of it is ours"
    print(f"  {'the machine':18} {least * 1e3:8.1f} ms  {ratio:20}   at {rates}, {read:.0f} GB/s")
    for peer, why in measured["missing"].items():
        print(f"  {peer} is missing: {why[:150]}")


if __name__ == "__main__":
    sys.exit(main())
