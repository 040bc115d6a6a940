"""`compile`: resolve, trace and optimize a model, and build its executable."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from treadle.backends.registry import find_backend
from treadle.backends.staged import build
from treadle.compiled import Compiled
from treadle.computing import computing_in
from treadle.files.nearest_names import NearestNames
from treadle.frontends.declarations import Model
from treadle.frontends.onnx_import.errors import StaticArgumentNeeded
from treadle.ir.errors import Hint, UsageError
from treadle.ir.graph import Graph
from treadle.ir.initial_values import Init
from treadle.ir.source_lines import user_line
from treadle.ir.target import Target
from treadle.ir.transforms.encoded_weights import encode_weights, given_parameters
from treadle.option_values import budget_of, parse_bytes
from treadle.passes.framework.manager import Pass, PassManager, debug_level
from treadle.passes.pipelines import DEFAULT
from treadle.program.resolved import Resolved
from treadle.program.source import AnyModel, ModelSource
from treadle.specializing import Specializing

Array = np.ndarray[Any, Any]


def compile(
    model: AnyModel,
    *,
    backend: str = "numpy",
    target: str | Target = "cpu",
    weights: Mapping[str, Array] | str | Path | None = None,
    passes: Sequence[Pass] = DEFAULT,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    seed: int = 0,
    certify: bool | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    widen: str | Iterable[str] = (),
    limits: Mapping[str, int] | None = None,
    memory: int | str | None = None,
    sizes: Mapping[str, int] | None = None,
    donate: Sequence[str] = (),
    **config: Any,
) -> Compiled:
    """Compile a model for a backend and a target. Call the result with arrays by name.

        exe = t.compile(tiny_gpt, backend="tvm", layers=6)
        logits = exe(tokens=np.array([[11, 7, 42]]))["logits"]

    model     a declaration, a graph, a module that `from_torch` imported, an opened `ModelSource`, or a name: a folder
              with a checkpoint, an ONNX or GGUF file, `file.py:function`, a family of the zoo, a fetched model
    backend   "numpy", "torch" or "tvm", or one that is registered under the entry point group `treadle.backends`
    target    what to compile for: "cpu"
    weights   arrays by parameter name, each of the parameter's shape, in place of the checkpoint's; for a declaration
              also a folder or a .safetensors file with them. If there are none, initial values are drawn from `seed`.
              Arrays are not copied, so the caller must not modify them afterwards
    passes    the pipeline, a flat list; []: the graph as declared
    inputs    optional inputs of the declaration to include, such as ("lengths",)
    outputs   names of the outputs to return; operations that only other outputs need are not computed. "hidden[:, 0]"
              is a part of an output: a position, or `start:stop`, for each of its first axes. None: all
    seed      an integer, 0 or more
    certify   test every rewrite on random values before it is accepted (docs/passes.md); None: follow TREADLE_CERTIFY
    dtype     "bf16": products with weights have bf16 operands and are summed in f32, everything else is f32
              (docs/decisions/0013-products-in-bf16.md). "f32": everything is f32. None: as the model is declared
    quantize  "int8-weights": weights that products multiply are stored in 8 bits, with a scale per row; "int4": in 4
              bits, with a scale per 32 neighbors. "int8", "int4-int8": in addition, activations that are multiplied by
              quantized weights (including those of a GGUF file) are rounded to 8 bits at every call
              (docs/quantization.md). None: as stored
    widen     "bf16", "f16", or both: values of these dtypes become f32, including weights. "blocks": weights that a
              GGUF file stores in blocks are decoded to f32 when they are read; otherwise they stay in blocks
              (docs/quantization.md)
    memory    limit on a run's memory in addition to weights, inputs and outputs: bytes, or text such as "300MB"
              (docs/memory.md)
    sizes     the largest sizes of symbolic axes for which the run must stay within `memory`; they become bounds of the
              result. Default: 1 for a batch and 128 for other axes
    donate    names of inputs that the caller donates with each call: a run may overwrite their memory and return it as
              outputs (docs/memory.md). Each must be a contiguous, writable array of the input's dtype
    limits    limits on what a file may contain, by name, such as {"tensors": 1_000_000}; errors name the limit
    config    configuration of the declaration; for an ONNX file, sizes of axes, and values of inputs that determine
              shapes

    If an input of an ONNX file determines shapes and config does not give its value, the file is compiled at the first
    call with each new value: `treadle.specializing`.

    Raises UsageError for an invalid argument, FrontendError for a model that cannot be read or traced, CheckpointError
    for a damaged file or one that does not fit, PassError if a pass fails, BackendError for a backend that is not
    available or rejects the graph, or if no plan fits `memory`. All are TreadleError, as are errors in a model's own
    lines (GraphError, RuleError, SizeError).
    """
    where = target if isinstance(target, Target) else Target(target)
    run, widen = computing_in(dtype, checked_passes(passes), widen, quantize)
    manager = PassManager(run, certify=certify, target=where)
    chosen = find_backend(backend)
    parse_bytes(memory)  # before anything is read

    stored, arrays = (weights, None) if isinstance(weights, str | Path) else (None, weights)

    if isinstance(model, Model):
        _refuse_misspelt(config, model)
    source = ModelSource.open(model, weights=stored, limits=limits)

    def make(static: Mapping[str, Any]) -> Compiled:
        resolved = source.resolve(inputs=inputs, outputs=outputs, widen=widen, **{**config, **static})
        optimized = manager.run(resolved.graph)
        bound, drawn = weights_of(resolved, optimized.graph, arrays, seed)
        budget = budget_of(memory, sizes, optimized.graph)
        executable, lowered = build(
            chosen,
            optimized.graph,
            where,
            bound,
            certify=certify,
            budget=budget,
            donate=donate,
            verified=True,
        )
        optimized = replace(optimized, lowered=lowered)
        if debug_level() >= 4:
            print(executable.source, file=sys.stderr)
        return Compiled(
            resolved.name, optimized, executable, backend, where, bound, resolved.unused, drawn, resolved.unread
        )

    try:
        return make({})
    except StaticArgumentNeeded as needed:
        return Specializing(source.inputs(widen, config), needed.argument, make, backend=backend, target=where)


def weights_of(
    resolved: Resolved, graph: Graph, weights: Mapping[str, Array] | None, seed: int
) -> tuple[dict[str, Array], int | None]:
    """Return the weights of an optimized graph, and the seed if they were drawn: the given, the model's, or random
    ones.

    Raises UsageError for weights that do not fit, as `compile` does.
    """
    if weights is not None:
        _refuse_unknown(weights, resolved.graph.parameters)
    given = weights if weights is not None else resolved.weights
    bound = initial_weights(graph, seed) if given is None else _chosen(graph, given)
    return encode_weights(graph, bound), seed if given is None else None


def initial_weights(graph: Graph, seed: int = 0) -> dict[str, Array]:
    """Return initial values of every weight. Each is drawn from the seed and its name, so a new weight changes no
    other.

    Raises UsageError for a negative seed, or a weight that cannot be drawn.
    """
    if seed < 0:
        raise UsageError(f"a seed is 0 or more, not {seed}")
    return {name: initial_weight(graph, name, seed) for name in graph.parameters}


def initial_weight(graph: Graph, name: str, seed: int = 0) -> Array:
    """Return the initial value of one weight. Raises UsageError if it cannot be drawn."""
    value = graph.parameters[name]
    shape = value.type.static_shape
    if shape is None or value.type.dtype.numpy is None:
        narrow = shape is not None
        hint = Hint(
            "weights=" + ', or widen="bf16"' * narrow, "--widen bf16" if narrow else "a checkpoint with its weights"
        )
        raise UsageError(f"parameter {name}: {value.type} cannot be drawn", hint=hint)
    rng = np.random.default_rng([seed, *name.encode()])
    return graph.initial.get(name, Init("normal", 0.02)).draw(shape, value.type.dtype, rng)


def checked_passes(passes: object) -> tuple[Pass, ...]:
    """Return the pipeline as a tuple. Raises UsageError if it is not a sequence of passes."""
    if isinstance(passes, Sequence) and all(isinstance(p, Pass) for p in passes):
        return tuple(passes)
    raise UsageError(
        "passes= must be a list of passes",
        received=f"{passes!r}"[:80],
        hint="leave it out for the default pipeline; [] compiles the graph as declared",
    )


def _refuse_misspelt(config: Iterable[str], model: Model) -> None:
    """Raise UsageError for a name that is not an option of the model and resembles an argument of `compile`."""
    options = [p.name for p in inspect.signature(compile).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in config:
        near = [*NearestNames([*options, *model.defaults]).of(name)] if name not in model.defaults else []
        if near and near[0] in options:
            raise UsageError(
                f"neither compile nor model {model.name} has an option {name}",
                source=str(user_line() or "") or None,
                hint=f"did you mean {near[0]}=?",
            )


def _refuse_unknown(weights: Iterable[str], known: Iterable[str]) -> None:
    names = [*known]
    unknown = sorted({*map(str, weights)}.difference(names))
    if unknown:
        nearest = NearestNames(names)
        pairs = [(name, near) for name in unknown[:3] for near in nearest.of(name, 1)]
        meant = ", ".join(f"{near} for {name}" for name, near in pairs)
        raise UsageError(
            f"weights= has {len(unknown)} that the model does not take",
            received=_few(unknown),
            hint=f"{meant}?" if meant else f"the model's are {_few(names)}",
        )


def _chosen(graph: Graph, weights: Mapping[str, Array]) -> dict[str, Array]:
    names = given_parameters(graph)
    missing = [name for name in names if name not in weights]
    if missing:
        raise UsageError(
            f"weights= lacks {len(missing)} of {len(names)} parameter{'s' * (len(names) != 1)}",
            received=_few(missing),
        )
    return {name: weights[name] for name in names}


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
