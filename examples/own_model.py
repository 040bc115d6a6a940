"""A model of your own: declare it, look at what the compiler did with it, and generate tokens.

    python examples/own_model.py [tiny | small] [BACKEND]

Cost: On two cores of an EPYC with tvm, `small` (117 million weights, 467 MB) took 9 s of CPU time and 1.8 GB of
memory, with the compilation. `tiny` takes 1 s.
"""

import sys
from typing import Annotated

import numpy as np

import treadle as t

SIZES = {
    "tiny": {"vocab": 300, "dim": 32, "heads": 4, "layers": 2},
    "small": {"vocab": 32000, "dim": 768, "heads": 12, "layers": 12},
}


@t.model
def my_gpt(
    tokens: Annotated[t.Tensor, t.i64["B S"]], *, vocab: int = 32000, dim: int = 768, heads: int = 12, layers: int = 12
) -> t.Tensor:
    """A decoder with rotary positions and attention to the last 256 tokens: next-token logits [B, S, vocab]."""
    positions, frequencies = t.positions(tokens), t.rotary_frequencies(dim // heads)
    near = t.causal & t.window(256)

    def rotate(x: t.Tensor) -> t.Tensor:
        return t.rotary(x, positions, frequencies)

    x = t.embed(tokens, vocab, dim, name="embed")
    for _ in t.stack("layer", layers):
        x += t.self_attention(t.rms_norm(x, name="norm_1"), heads, mask=near, rotate=rotate, name="attn")
        x += t.gated_mlp(t.rms_norm(x, name="norm_2"), 3 * dim, name="mlp")
    return t.unembed(t.rms_norm(x, name="norm"), tied="embed")


def main(size: str = "small", backend: str = "tvm") -> None:
    exe = t.compile(my_gpt, backend=backend, seed=1, **SIZES[size])
    print(exe)
    print(f"{sum(weight.size for weight in exe.weights.values()):,} weights")

    # The log has what each pass changed. `print(exe.graph)` prints the optimized graph, each repeated block once.
    print("\n".join(line for line in exe.log.table(times=False).splitlines() if "->" in line))

    # One declaration serves whole texts, and generation token by token with caches.
    print(t.follow(exe.graph, "S").step())
    session = exe.session(rows=1, capacity=64)
    row = session.open()
    logits = session.prefill({row: [5, 6, 7]})[row]  # [vocab], for the token after 7
    for _ in range(8):
        logits = session.step({row: int(logits.argmax())})[row]
    print("tokens:", session.tokens(row))

    # The steps compute the same numbers as one call with the whole text.
    (whole,) = exe(tokens=np.array([session.tokens(row)])).values()
    print("largest difference:", f"{np.abs(whole[0, -1] - logits).max():.0e}")


if __name__ == "__main__":
    if len(sys.argv) - 1 > 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
