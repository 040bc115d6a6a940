"""Training compared with PyTorch: a step of AdamW, its gradient, and its memory.

    python benchmarks/training.py [--only ROW] [--threads 1] [--dtype f32] [--against eager,compile] [--json]

The same model, batch, loss, clipping and optimizer on each side: Hugging Face's model in training mode without dropout,
with PyTorch's fused AdamW. All run in one process and take turns, so that a busy machine slows all alike; a figure is a
median over rounds, after three warm-up steps. `compile` is torch.compile of the model, whose first steps, which take
minutes on some machines, are not counted. The losses of those three steps are compared: the exit status is 1 if they
differ by more than 1e-3 in f32, and 1e-2 in bf16.

    gpt2     12 layers of 768, 50,257 words, 1 text of 128 tokens
    gpt2-b8  the same, 8 texts of 64
    llama    30 layers of 576 with grouped heads, 49,152 words, as SmolLM2-135M, 1 text of 128
    bert     12 layers of 768, 30,522 words, 4 texts of 128, the loss over all tokens
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from treadle.ir.target import Target
from treadle.runtime.training.optimizers import AdamW
from treadle.training.trainer import Trainer

Array = np.ndarray[Any, Any]

RATE = 1e-4
APART = {"f32": 1e-3, "bf16": 1e-2}
ROWS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "gpt2": ("GPT2LMHeadModel", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, 1, 128),
    "gpt2-b8": ("GPT2LMHeadModel", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, 8, 64),
    "llama": (
        "LlamaForCausalLM",
        {
            **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
            **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        },
        1,
        128,
    ),
    "bert": ("BertForMaskedLM", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, 4, 128),
}
"""The class, its configuration, the number of texts and their length."""

Step = Callable[[], float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=tuple(ROWS), action="append")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", default="eager", help="eager, compile, or both (eager)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = [measure(row, given) for row in given.only or ROWS]
    if given.json:
        print(json.dumps(found, indent=1))
    return int(any(row["losses_apart"] > APART[given.dtype] for row in found))


def measure(row: str, given: argparse.Namespace) -> dict[str, Any]:
    name, config, batch, length = ROWS[row]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**config))
    drawn = np.random.default_rng(0).integers(1000, 20000, (batch, length + 1))
    tokens, targets = np.ascontiguousarray(drawn[:, :-1]), np.ascontiguousarray(drawn[:, 1:])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        began = time.perf_counter()
        trainer = Trainer(
            folder,
            learning_rate=RATE,
            optimizer=AdamW(weight_decay=0.0),
            backend="tvm",
            target=Target("cpu", given.threads),
            dtype=None if given.dtype == "f32" else given.dtype,
        )
        compiled_in = time.perf_counter() - began
        models = [cls.from_pretrained(folder).train() for _ in given.against.split(",")]
    sides: dict[str, Step] = {"treadle": lambda: trainer.step(tokens=tokens, targets=targets).loss}
    for side, own in zip(given.against.split(","), models, strict=True):
        sides[side] = torch_step(own, tokens, targets, side, given.dtype)
    losses = {side: [step() for _ in range(3)] for side, step in sides.items()}
    apart = max(abs(a - b) for each in losses.values() for a, b in zip(losses["treadle"], each, strict=True))
    times: dict[str, list[float]] = {side: [] for side in sides}
    gc.disable()
    for _ in range(given.rounds):
        for side, step in sides.items():
            began = time.perf_counter()
            step()
            times[side].append(time.perf_counter() - began)
    gc.enable()
    seconds = {side: statistics.median(each) for side, each in times.items()}
    facts = {
        "row": row,
        "threads": given.threads,
        "dtype": given.dtype,
        "seconds": seconds,
        "ratios": {
            side: statistics.median(a / b for a, b in zip(times["treadle"], each, strict=True))
            for side, each in times.items()
            if side != "treadle"
        },
        "losses_apart": apart,
        "compiled_in": compiled_in,
        "arena": trainer.memory(B=batch, S=length).arena,
    }
    if not given.json:
        ratios = ", ".join(f"{ratio:.2f} of {side}'s {seconds[side]:.3f} s" for side, ratio in facts["ratios"].items())
        print(
            f"{row}: a step takes {seconds['treadle']:.3f} s, {ratios}; losses apart by {apart:.1e}; compiled in "
            f"{compiled_in:.1f} s; an arena of {(facts['arena'] or 0) / 1e6:.0f} MB",
            flush=True,
        )
    return facts


def torch_step(model: Any, tokens: Array, targets: Array, side: str, dtype: str) -> Step:
    """Return a step of PyTorch's; bf16 is its autocast."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    called = torch.compile(model) if side == "compile" else model
    given, wanted = torch.from_numpy(tokens), torch.from_numpy(targets).flatten()

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            logits = called(input_ids=given).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, -2), wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    sys.exit(main())
