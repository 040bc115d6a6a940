"""A rewrite pass of your own: log(softmax(x)) becomes log_softmax(x), which is finite where softmax rounds to 0.

    python examples/own_pass.py [tiny | small]

The pass is a pattern, a check and a replacement. The compiler tests it on random inputs before it accepts it
(`certify=True`), and reports where it applied and where it refused, with your source lines.

Cost: `small` (49 million weights) took 2.8 s of CPU time and 443 MB of memory with numpy, on two cores of an EPYC.
The certificate is computed at small sizes, so it takes as long as for `tiny`.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import numpy as np

import treadle as t
from treadle.passes.framework.rewrite import Refusal, Rewrite
from treadle.passes.pipelines import DEFAULT

SIZES = {"tiny": {"vocab": 100, "dim": 16}, "small": {"vocab": 32000, "dim": 768}}


@dataclass(frozen=True)
class FuseLogOfSoftmax(Rewrite):
    """log(softmax(x))   -->   log_softmax(x)

    Refuses: a softmax over another axis than the last. A softmax that is used elsewhere is refused for every pattern.
    """

    def pattern(self, p, x):
        return p.log(p.softmax(x, axis=p.attribute("axis")))

    def check(self, m):
        return None if m.axis == -1 else Refusal(f"the softmax is over axis {m.axis}, not the last")

    def rewrite(self, b, m):
        return b.log_softmax(m.x, axis=-1)


@t.model
def scores(tokens: Annotated[t.Tensor, t.i64["B S"]], *, vocab: int = 100, dim: int = 16) -> dict[str, t.Tensor]:
    """Log-probabilities [B, S, vocab] of the next token, and of a position among all positions."""
    x = t.embed(tokens, vocab, dim, name="embed")
    y = t.linear(x, vocab, name="head")
    return {
        "next": t.log(t.softmax(1e5 * y, axis=-1)),  # probabilities down to 0 in float32
        "position": t.log(t.softmax(t.reduce_sum(y, axes=(2,)), axis=-2)),
    }


def main(size: str = "small") -> None:
    tokens = np.arange(16).reshape(2, 8)
    plain = t.compile(scores, backend="numpy", **SIZES[size])
    with np.errstate(divide="ignore"):
        print("smallest without the pass:", plain(tokens=tokens)["next"].min())

    exe = t.compile(scores, backend="numpy", passes=[*DEFAULT, FuseLogOfSoftmax()], certify=True, **SIZES[size])
    print("smallest with the pass:", np.round(exe(tokens=tokens)["next"].min()))

    record = next(each for each in exe.log if each.name == "fuse-log-of-softmax")
    for match in record.matches:
        print("applied:", match)
    for refusal in record.refusals:
        print("refused:", refusal)
    for certificate in record.certificates:
        print("certificate:", certificate)


if __name__ == "__main__":
    if len(sys.argv) - 1 > 1:
        sys.exit(__doc__)
    main(*sys.argv[1:])
