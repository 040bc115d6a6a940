"""The public entry functions with their options, from `program.option_table`: entry_functions.py as type checkers see
it. Written by `make golden`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treadle.compiled import Compiled
from treadle.files.contained_files import PathLike
from treadle.ir.target import Target
from treadle.passes.framework.manager import Pass
from treadle.program.source import AnyModel
from treadle.runtime.training.optimizers import Optimizer
from treadle.runtime.training.schedules import Schedule
from treadle.tasks.loaded import LoadedModel
from treadle.training.trainer import Trainer as _Trainer

Array = np.ndarray[Any, Any]

def compile(
    model: AnyModel,
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    widen: str | Iterable[str] = (),
    limits: Mapping[str, int] | None = None,
    mmproj: str | Path | None = None,
    weights: Mapping[str, Array] | str | Path | None = None,
    seed: int = 0,
    passes: Sequence[Pass] | str | None = None,
    without: Sequence[str] = (),
    certify: bool | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    backend: str = "auto",
    target: str | Target = "cpu",
    memory: int | str | None = None,
    sizes: Mapping[str, int] | None = None,
    donate: Sequence[str] = (),
    torch_compile: bool = False,
    **config: Any,
) -> Compiled:
    """Compile a model for a backend and a target. Call the result with arrays by name.

        exe = t.compile(tiny_gpt, backend="tvm", layers=6)
        logits = exe(tokens=np.array([[11, 7, 42]]))["logits"]

    model     a declaration, a graph, a module that `from_torch` imported, or a name: a folder with a checkpoint, an
              ONNX or GGUF file, `file.py:function`, a family of the zoo, a fetched model
    inputs    optional inputs of the declaration to include, such as ("lengths",)
    outputs   names of the outputs to return; operations that only other outputs need are not computed. "hidden[:, 0]"
              is a part of an output: a position, or `start:stop`, for each of its first axes. None: all
    widen     "bf16", "f16", or both: values of these dtypes become f32, including weights. "blocks": weights that a
              GGUF file stores in blocks are decoded to f32 when they are read; otherwise they stay in blocks
              (docs/quantization.md)
    limits    limits on what a file may contain, by name, such as {"tensors": 1_000_000}; errors name the limit
    mmproj    for a language model in a GGUF file, the GGUF file of its image encoder and projector. None: the file
              mmproj*.gguf next to it, if there is one. "none": no image encoder (docs/vision.md)
    weights   arrays by parameter name, each of the parameter's shape, in place of the checkpoint's; or, for a
              declaration, a graph or an imported module, the folder or .safetensors file that holds them. If there are
              none, initial values are drawn from `seed`. Arrays are copied, unless they are read-only
    seed      an integer, 0 or more
    passes    the pipeline: a list of passes, or its text, such as "fuse-gelu, fuse-linear" (docs/passes.md); []: the
              graph as declared; None: `treadle.passes.pipelines.DEFAULT`
    without   names of passes to leave out of the pipeline, such as ("fuse-gelu",)
    certify   test every rewrite on random values before it is accepted (docs/passes.md); None: follow TREADLE_CERTIFY
    dtype     "bf16": products with weights have bf16 operands and are summed in f32, everything else is f32
              (docs/decisions/0013-products-in-bf16.md). "f32": everything is f32. None: as the model is declared
    quantize  "int8-weights": weights that products multiply are stored in 8 bits, with a scale per row; "int4": in 4
              bits, with a scale per 32 neighbors. "int8", "int4-int8": in addition, activations that are multiplied by
              quantized weights (including those of a GGUF file) are rounded to 8 bits at every call
              (docs/quantization.md). "as-stored": inputs of products are rounded as the settings of a quantized folder
              ask for it. None: weights as stored, and inputs not rounded
    backend   "auto", the fastest installed backend that accepts the graph; "numpy", "torch" or "tvm", or one that is
              registered under the entry point group `treadle.backends`
    target    what to compile for: "cpu", `Target("cpu", threads=4)`, "cuda", "cuda:1", or other hardware by name:
              opencl, webgpu, metal, x86-64-amx, x86-64-v4-bf16, x86-64-v4, x86-64-v3, x86-64-v2, x86-64, arm64, a100,
              h100, h200, b200, l4, rtx4090
    memory    limit on a run's memory in addition to weights, inputs and outputs: bytes, or text such as "300MB"
              (docs/memory.md)
    sizes     the largest sizes of symbolic axes for which the run must stay within `memory`; they become bounds of the
              result. Default: 1 for a batch and 128 for other axes
    donate    names of inputs that the caller donates with each call: a run may overwrite their memory and return it as
              outputs (docs/memory.md). Each must be a contiguous, writable array of the input's dtype
    torch_compile  let torch.compile compile the program that the torch backend emits, at the first calls; off by
              default, since the gain has not been measured (docs/gpu.md)
    config    configuration of the declaration; for an ONNX file, sizes of axes, and values of inputs that determine
              shapes

    If an input of an ONNX file determines shapes and config does not give its value, the file is compiled at the first
    call with each new value: `treadle.specializing`.

    Raises UsageError for an invalid argument, FrontendError for a model that cannot be read or traced, CheckpointError
    for a damaged file or one that does not fit, PassError if a pass fails, BackendError for a backend that is not
    available or rejects the graph, or if no plan fits `memory`. All are TreadleError, as are errors in a model's own
    lines (GraphError, RuleError, SizeError).
    """

def load(
    model: PathLike | AnyModel,
    *,
    widen: str | Iterable[str] = (),
    limits: Mapping[str, int] | None = None,
    tokenizer: str | Path | None = None,
    mmproj: str | Path | None = None,
    weights: Mapping[str, Array] | str | Path | None = None,
    passes: Sequence[Pass] | str | None = None,
    without: Sequence[str] = (),
    certify: bool | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    backend: str = "auto",
    target: str | Target = "cpu",
    cache: str | None = None,
    **config: Any,
) -> LoadedModel:
    """Load a checkpoint folder with its tokenizer, a GGUF file, a fetched model's name, or a declaration with
    `weights`: "file.py:function", or the function. Return an object whose methods are the model's tasks: classify,
    answer, ... A graph with `weights`, a module from `from_torch` and an ONNX file, with `tokenizer`, continue text.

    widen     "bf16", "f16", or both: values of these dtypes become f32, including weights. "blocks": weights that a
              GGUF file stores in blocks are decoded to f32 when they are read; otherwise they stay in blocks
              (docs/quantization.md)
    limits    limits on what a file may contain, by name, such as {"tensors": 1_000_000}; errors name the limit
    tokenizer  another model, whose tokenizer, chat template and end tokens are used
    mmproj    for a language model in a GGUF file, the GGUF file of its image encoder and projector. None: the file
              mmproj*.gguf next to it, if there is one. "none": no image encoder (docs/vision.md)
    weights   arrays by parameter name, each of the parameter's shape, in place of the checkpoint's; or, for a
              declaration, a graph or an imported module, the folder or .safetensors file that holds them. If there are
              none, initial values are drawn from `seed`. Arrays are copied, unless they are read-only
    passes    the pipeline: a list of passes, or its text, such as "fuse-gelu, fuse-linear" (docs/passes.md); []: the
              graph as declared; None: `treadle.passes.pipelines.DEFAULT`
    without   names of passes to leave out of the pipeline, such as ("fuse-gelu",)
    certify   test every rewrite on random values before it is accepted (docs/passes.md); None: follow TREADLE_CERTIFY
    dtype     "bf16": products with weights have bf16 operands and are summed in f32, everything else is f32
              (docs/decisions/0013-products-in-bf16.md). "f32": everything is f32. None: as the model is declared
    quantize  "int8-weights": weights that products multiply are stored in 8 bits, with a scale per row; "int4": in 4
              bits, with a scale per 32 neighbors. "int8", "int4-int8": in addition, activations that are multiplied by
              quantized weights (including those of a GGUF file) are rounded to 8 bits at every call
              (docs/quantization.md). "as-stored": inputs of products are rounded as the settings of a quantized folder
              ask for it. None: weights as stored, and inputs not rounded
    backend   "auto", the fastest installed backend that accepts the graph; "numpy", "torch" or "tvm", or one that is
              registered under the entry point group `treadle.backends`
    target    what to compile for: "cpu", `Target("cpu", threads=4)`, "cuda", "cuda:1", or other hardware by name:
              opencl, webgpu, metal, x86-64-amx, x86-64-v4-bf16, x86-64-v4, x86-64-v3, x86-64-v2, x86-64, arm64, a100,
              h100, h200, b200, l4, rtx4090
    cache     the dtype of keys and values for generation: "f32", "bf16" or "f16"; None: the dtype that the model
              computes
    config    configuration of the model, which overrides the checkpoint's

    An artifact of a model that continues or embeds text is loaded, too, for these tasks. The model is compiled when its
    first task runs. Raises UsageError if there is no such model, for another artifact, and for an option that only
    artifacts have; BackendError for an unknown backend; and the errors of `compile` for a value of an option that no
    model accepts.
    """

class Trainer(_Trainer):
    def __init__(
        self,
        model: AnyModel,
        *,
        loss: str = "cross-entropy",
        optimizer: Optimizer = ...,
        learning_rate: float | Schedule = 0.001,
        max_grad_norm: float | None = 1.0,
        trained: Iterable[str] | None = None,
        output: str | None = None,
        teacher: Compiled | None = None,
        temperature: float | None = None,
        distillation_weight: float | None = None,
        gradient_checkpointing: bool = False,
        gradient_accumulation_steps: int = 1,
        inputs: Sequence[str] | None = None,
        limits: Mapping[str, int] | None = None,
        tokenizer: str | Path | None = None,
        weights: Mapping[str, Array] | str | Path | None = None,
        new_weights: Sequence[str] = (),
        seed: int = 0,
        dtype: str | None = None,
        backend: str = "auto",
        target: str | Target = "cpu",
        **config: Any,
    ) -> None:
        """Compile the graphs of a training step.

        model       as in `compile`. Training begins with the weights of a checkpoint, converted to float32. A model
                    without a checkpoint gets random weights, drawn from `seed`.
        loss        "cross-entropy" over the last axis of an output, with class indices as `targets`, of which -100
                    is not counted; with a teacher, combined with the divergence from the teacher's output. "mse": the
                    mean squared error between an output and `targets` of its shape. Or the name of a scalar output of
                    the model, which is then minimized.
        optimizer   `AdamW(...)` or `SGD(...)`; weight decay applies to weights with two axes or more
        learning_rate  a constant learning rate, or a `Schedule`
        max_grad_norm  clip the gradient norm to this value; None disables clipping
        trained     patterns of names, such as "h.*.mlp.*"; other weights are frozen. None: all weights except buffers;
                    for a module that `from_torch` imported, its parameters that require a gradient
        output      the output that `targets` are compared with; None: "logits", or the only output
        teacher     a compiled model that has an output of the same name. The teacher gets the inputs that both models
                    have.
        temperature, distillation_weight  temperature and weight of the teacher's loss, by default 2 and 0.5; see
                    `treadle.ir.transforms.training_losses`
        gradient_checkpointing  recompute the activations of repeated blocks instead of saving them
        gradient_accumulation_steps  number of calls of `step` whose gradients are accumulated for one update
        tokenizer   another model, whose tokenizer is saved with a checkpoint of the trained weights
        new_weights  patterns of names of weights that are drawn from `seed`, such as a new head: ("logits.*",). The
                    others are read from `weights`, which may be those of another declaration
        options     as in `compile`; with dtype="bf16", matrix products have bf16 operands

        Raises UsageError for an invalid option, and the errors of `compile`.
        """
