"""Train a language model from scratch on a text file, byte by byte, and sample from it.

    python examples/train_from_scratch.py corpus.txt [tiny | small] [BACKEND]

Tokens are bytes, so no tokenizer is needed. `treadle train` trains with a tokenizer, held-out texts and checkpoints
(docs/training.md).

Cost: `small` (5 million weights) took 0.5 s of CPU time a step and 0.9 GB of memory on two cores of an EPYC with tvm:
1000 steps take 9 minutes of CPU time (extrapolated from 30 steps). `tiny` takes 7 s with numpy.
"""

import sys
from pathlib import Path
from typing import Annotated

import numpy as np

import treadle as t
from treadle.runtime.generation import generate
from treadle.training.texts import BlockBatches, blocks_of, next_token_targets

SIZES = {  # the model, tokens of a block, blocks of a batch, steps
    "tiny": ({"dim": 32, "heads": 2, "layers": 2, "context": 64}, 32, 8, 60),
    "small": ({"dim": 256, "heads": 8, "layers": 6, "context": 256}, 128, 16, 1000),
}


@t.model
def bytes_gpt(
    tokens: Annotated[t.Tensor, t.i64["B S"]],
    *,
    dim: int = 256,
    heads: int = 8,
    layers: int = 6,
    context: int = 256,
) -> t.Tensor:
    """GPT-2 over bytes: next-byte logits [B, S, 256]."""
    x = t.embed(tokens, 256, dim, name="wte") + t.embed(t.positions(tokens), context, dim, name="wpe")
    for _ in t.stack("h", layers):
        x += t.self_attention(t.layer_norm(x, name="ln_1"), heads, causal=True, name="attn")
        x += t.mlp(t.layer_norm(x, name="ln_2"), 4 * dim, name="mlp")
    return t.unembed(t.layer_norm(x, name="ln_f"), tied="wte")


def main(path: str, size: str = "small", backend: str = "tvm") -> None:
    config, length, batch, steps = SIZES[size]
    blocks = blocks_of([list(Path(path).read_bytes())], length, end=None)  # i64[N, length]
    rate = t.Schedule(3e-3, warmup=steps // 10, steps=steps, shape="cosine")
    trainer = t.Trainer(bytes_gpt, learning_rate=rate, backend=backend, seed=0, **config)
    print(trainer)

    for step, tokens in enumerate(BlockBatches(blocks, batch, seed=0).after(0)):
        if step == steps:
            break
        result = trainer.step(tokens=tokens, targets=next_token_targets(tokens))
        if step % (steps // 5) == 0 or step == steps - 1:
            print(f"step {step + 1:>5}: loss {result.loss:.2f} nats a byte")
    trainer.save_state("trained.safetensors")  # resume with trainer.restore("trained.safetensors")

    exe = trainer.compiled(backend=backend)
    prompt = list(Path(path).read_bytes()[:16])
    session = exe.session(rows=1, capacity=config["context"])
    sampling = t.Sampling(temperature=0.7, seed=1)
    drawn = [token.id for token in generate(session, [prompt], most=config["context"] // 2, sampling=sampling)]
    print(bytes(np.uint8([*prompt, *drawn])).decode(errors="replace"))


if __name__ == "__main__":
    if not 1 <= len(sys.argv) - 1 <= 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
