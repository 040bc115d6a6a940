"""Compare gradients with autograd's at zeros, ties, large numbers and fully masked rows. Compare gradients of random
masked programs before and after recognition.

    python -m tests.fuzz.gradient_edges [--only NAME] [--programs 200] [--no-onnx] [--certify]

Every case of tests/gradient_edges.py runs in float64 and float32, alone and after recognition, through `from_torch` and
through a file of torch's ONNX exporter. Prints the places where autograd returns NaN, the ONNX files whose
gradient is that of another function, and the errors. Exit status 1 if there is an error.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import warnings

import numpy as np
import torch

from tests.gradient_edges import CASES, judged
from tests.masked_programs import drawn_program, gradients_of
from treadle.ir.errors import TreadleError
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import RECOGNITION


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="a part of the names of cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--no-onnx", action="store_true")
    parser.add_argument("--certify", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    np.seterr(all="ignore")
    wrong, judgements = 0, 0
    for name, case in CASES.items():
        if options.only not in name:
            continue
        ways = [False, True] if not options.no_onnx else [False]
        for onnx, float64, recognized in itertools.product(ways, (True, False), (False, True)):
            unknown: list[str] = []
            text = f"{name}, f{64 if float64 else 32}{', onnx' * onnx}{', recognized' * recognized}"
            try:
                given = {"float64": float64, "recognized": recognized, "onnx": onnx, "certify": options.certify}
                found = judged(case, **given, unknown=unknown)
            except torch.onnx.OnnxExporterError as error:
                print(f"{text}: no file: {str(error).splitlines()[0]}", flush=True)
                continue
            except (TreadleError, RuntimeError) as error:
                found = [f"{type(error).__name__}: {error}"]
            judgements += 1
            wrong += bool(found)
            for line in found:
                print(f"{text}: {line}", flush=True)
            for line in unknown if not (onnx or recognized) else ():
                print(f"{text}: autograd gives NaN by {line}", flush=True)
        if case.file and not options.no_onnx:
            print(f"{name}: its ONNX file has {case.why}", flush=True)
    for seed in range(options.seed, options.seed + options.programs):
        graph, inputs = drawn_program(seed)
        after = PassManager(RECOGNITION, certify=options.certify, differentiated=True).run(graph).graph
        before, now = gradients_of(graph, inputs), gradients_of(after, inputs)
        off = [n for n, g in before.items() if np.abs(now[n] - g).max() > 1e-9 * max(1.0, np.abs(g).max())]
        wrong += bool(off)
        if off:
            print(f"program {seed}: gradients by {', '.join(off)} differ after recognition", flush=True)
    print(f"{judgements} judgements and {options.programs} programs: {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
