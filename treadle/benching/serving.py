"""One side of a benchmark: a process that opens a model, and runs it on request.

    python serving.py '{"side": "onnxruntime", "threads": 1, "inputs": "inputs.npz", "outputs": "out.npz", ...}'

When the model is open, the process writes the model's outputs and prints a line of JSON. Then it reads lines. It
answers a number with the seconds of that number of runs (CPU time on one thread), and an empty line with its peak
memory. Only the sides of Treadle and PyTorch need Treadle. For other tools, any Python interpreter that has the tool
can run this file.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Spec = Mapping[str, Any]
Run = Callable[[], Mapping[str, Array]]
Opened = tuple[Run, str]
"""A function that runs the model once, and a line of text that describes it."""


class Unfit(Exception):
    """The error for a side that cannot run this model or workload. The message contains the reason."""


_MARK = "array "


def main() -> None:
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of packages must not mix with the answers
    try:
        started = time.perf_counter()
        run, note = OPENERS[spec["side"]](spec)
        outputs = run()
        opened = time.perf_counter() - started
    except Exception as error:
        say(answers, {"missing": why_missing(error)})
        return
    save_arrays(spec["outputs"], outputs)
    say(answers, {"opened": opened, "note": note})
    for line in sys.stdin:
        # Unlike wall-clock time, CPU time on one thread does not include other processes.
        clock = time.process_time if spec["threads"] == 1 else time.perf_counter
        counted = [timed(run, clock) for _ in range(int(line.strip() or 0))]
        say(answers, {"seconds": counted} if line.strip() else {"peak": peak_bytes()})


def why_missing(error: Exception) -> str:
    """Return the message of a side that could not be opened."""
    if isinstance(error, ImportError):
        return f"{error.name or error} is not installed"
    return str(error) if isinstance(error, Unfit) else " ".join(f"{type(error).__name__}: {error}".split())[:400]


def say(stream: Any, what: Mapping[str, Any]) -> None:
    print(json.dumps(what), file=stream, flush=True)


def timed(run: Run, clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    run()
    return clock() - started


STATUS = Path("/proc/self/status")
"""The facts of this process, on Linux."""


def peak_bytes() -> int:
    """Return the peak resident memory of this process in bytes."""
    if sys.platform == "win32":
        counters = (ctypes.c_size_t * 9)(72)  # PROCESS_MEMORY_COUNTERS of a 64-bit process, with its size
        process = ctypes.c_void_p(ctypes.windll.kernel32.GetCurrentProcess())
        ctypes.windll.kernel32.K32GetProcessMemoryInfo(process, counters, 72)
        return int(counters[1])
    if STATUS.exists():  # `getrusage` counts the parent's peak too, since a child begins as a copy of it
        peak = next((line for line in STATUS.read_text("ascii", "replace").splitlines() if line[:6] == "VmHWM:"), None)
        if peak is not None:
            return int(peak.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def save_arrays(path: str | Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays under any names. Each name gets a prefix, since NumPy interprets some names as options."""
    save: Any = np.savez
    save(path, **{f"{_MARK}{name}": np.asarray(array) for name, array in arrays.items()})


def read_arrays(path: str | Path) -> dict[str, Array]:
    """Read the arrays that `save_arrays` wrote."""
    with np.load(path) as file:
        return {name.removeprefix(_MARK): file[name] for name in file.files}


def config_of(folder: str | Path) -> dict[str, Any]:
    """Return the contents of a folder's config.json."""
    found: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return found


def tokens_of(spec: Spec, side: str) -> Array:
    """Return the only input of a side that supports only tokens. Raises Unfit for a model with other inputs."""
    inputs = list(inputs_of(spec).values())
    if len(inputs) != 1 or inputs[0].dtype != np.int64:
        raise Unfit(f"{side} supports only tokens as input, and this model has {len(inputs)} inputs")
    return inputs[0]


def inputs_of(spec: Spec) -> dict[str, Array]:
    return read_arrays(spec["inputs"])


# -- Treadle, and PyTorch ----------------------------------------------------------------------------------------


def open_treadle(spec: Spec) -> Opened:
    inputs, exe = inputs_of(spec), compiled(spec)
    from treadle.benching.workload import Workload

    options = Workload.from_dict(spec).options
    ways = [options.dtype, options.quantize and f"weights in {options.quantize}"]
    return lambda: exe(**inputs), ", ".join([f"the {exe.backend} backend", *filter(None, ways)])


def compiled(spec: Spec) -> Any:
    """Return our compiled model, a `treadle.compiled.Compiled`."""
    from treadle.artifacts.loading import load_artifact
    from treadle.artifacts.reading import is_artifact
    from treadle.benching.workload import Workload
    from treadle.compiling import compile_model
    from treadle.ir.target import Target

    options = Workload.from_dict(spec).options
    alone = options.backend == "numpy"  # numpy takes its threads from the environment
    options = options.but(target=Target("cpu", None if alone else spec["threads"]))
    if is_artifact(spec["model"]):
        how = {name: value for name, value in options.keywords().items() if name != "seed"}
        return load_artifact(spec["model"], **{**how, "backend": options.backend})
    return compile_model(spec["model"], options)


def open_eager(spec: Spec, around: Callable[[Any], Any] = lambda function: function) -> Opened:
    """Open PyTorch in eager mode. For a folder of Hugging Face's, run its own module; otherwise run the graph as
    declared.

    around  transforms the module or the function before it is called
    """
    import torch

    torch.set_num_threads(spec["threads"])
    function, call, note = _own_module(spec) or _declared(spec)
    function = around(function)

    def run() -> Mapping[str, Array]:
        with torch.inference_mode():
            found = call(function)
        return {name: x.float().numpy() for name, x in found.items() if isinstance(x, torch.Tensor)}

    return run, note


def open_compiled(spec: Spec) -> Opened:
    """Open the module or function of `open_eager` with torch.compile and frozen weights."""
    import torch
    import torch._inductor.config as inductor

    inductor.freezing = True
    run, note = open_eager(spec, torch.compile)
    run()
    return run, f"torch.compile, frozen; {note}"


Called = tuple[Any, Callable[[Any], Any], str]
"""A PyTorch module or function, a function that calls it on the inputs, and a line of text that describes it."""


def _own_module(spec: Spec) -> Called | None:
    """Return Hugging Face's module, if the model is one of their folders and tokens are its only input."""
    inputs = list(inputs_of(spec).values())
    if not spec["folder"] or len(inputs) != 1 or inputs[0].dtype != np.int64:
        return None
    import torch
    import transformers

    names = config_of(spec["folder"]).get("architectures") or ["AutoModel"]
    kind = getattr(transformers, names[0], transformers.AutoModel)
    module = kind.from_pretrained(spec["folder"], dtype=torch.float32).eval()
    tokens = torch.from_numpy(inputs[0])
    return module, lambda function: function(input_ids=tokens), f"{kind.__name__} of transformers"


def _declared(spec: Spec) -> Called:
    """Return a function of PyTorch calls, one for each op of the model's graph as declared, on unchanged weights.

    The function is called directly. In an executable, torch.compile would have to trace the checks of arguments, too.
    """
    import torch

    from treadle.backends.python.executable import PythonExecutable
    from treadle.backends.staged import build
    from treadle.backends.torch.backend import PlainTorch
    from treadle.benching.workload import Workload, opened
    from treadle.ir.target import Target

    graph, weights = opened(Workload.from_dict(spec))
    exe, _ = build(PlainTorch(), graph, Target("cpu", spec["threads"]), weights)
    assert isinstance(exe, PythonExecutable)
    arrays = inputs_of(spec)
    tensors = [torch.from_numpy(arrays[port.name]) for port in exe.inputs]
    held = exe.weights
    return exe.function, lambda function: function(*tensors, held), "the graph as declared, op by op"


# -- peers that read ONNX ----------------------------------------------------------------------------------------


def open_onnxruntime(spec: Spec) -> Opened:
    import onnxruntime

    path, note = spec["onnx"], "float32"
    if spec["side"].endswith("int8"):
        from onnxruntime.quantization import QuantType, quantize_dynamic, shape_inference

        folded, path, note = f"{path}.folded.onnx", f"{path}.int8.onnx", "dynamic int8"
        shape_inference.quant_pre_process(spec["onnx"], folded, skip_symbolic_shape=True, save_as_external_data=True)
        quantize_dynamic(
            folded,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = spec["threads"]
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names, given = [x.name for x in session.get_outputs()], _renamed(spec)
    return lambda: dict(zip(names, session.run(names, given), strict=True)), note


def open_openvino(spec: Spec) -> Opened:
    import openvino

    given = _renamed(spec)
    model = openvino.Core().read_model(spec["onnx"])
    model.reshape({name: list(array.shape) for name, array in given.items()})
    precision = "f32" if spec["side"] == "openvino" else "bf16"
    note = precision
    if spec["side"].endswith("int8"):
        import nncf

        # Calibrated on the benchmark's own input, which can only improve NNCF's accuracy.
        model = nncf.quantize(model, nncf.Dataset([given]), model_type=nncf.ModelType.TRANSFORMER, subset_size=1)
        note = "int8 by NNCF, static, the rest in bf16"
    settings = {
        "INFERENCE_NUM_THREADS": spec["threads"],
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.compile_model(model, "CPU", settings).create_infer_request()
    names = [output.get_any_name() for output in model.outputs]

    def run() -> Mapping[str, Array]:
        found = request.infer(given)
        return {name: found[i] for i, name in enumerate(names)}

    return run, f"{note}, sizes fixed"


def _renamed(spec: Spec) -> dict[str, Array]:
    """Return the inputs under the names that they have in the ONNX file."""
    return {spec["renamed"][name]: array for name, array in inputs_of(spec).items()}


# -- peers that read a folder of Hugging Face's, or a GGUF file -----------------------------------------------------

ENCODERS = ("bert", "camembert", "distilbert", "roberta", "xlm-roberta")
"""Model types that CTranslate2 runs as encoders; the other types that it converts are decoders, which generate."""
_NO_ENCODER = ("bart", "m2m_100", "marian", "mbart", "mt5", "pegasus", "t5", "whisper")
_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "sentencepiece.bpe.model", "tokenizer.model")


def open_ctranslate2(spec: Spec) -> Opened:
    import ctranslate2

    if not spec["folder"]:
        raise Unfit("CTranslate2 can only run a folder of Hugging Face's, and this model is not one")
    ids, kind = tokens_of(spec, "CTranslate2"), config_of(spec["folder"]).get("model_type")
    if kind in _NO_ENCODER:
        raise Unfit(f"CTranslate2 cannot run a {kind} by itself")
    form = "int8" if spec["side"].endswith("int8") else "float32"
    made = Path(spec["outputs"]).with_suffix(f".{form}")
    folder = _with_words(Path(spec["folder"]), made.with_suffix(".words"))
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(made), quantization=form)
    settings = {"device": "cpu", "compute_type": form, "inter_threads": 1, "intra_threads": spec["threads"]}
    words = ctranslate2.StorageView.from_array(ids.astype(np.int32))
    lengths = ctranslate2.StorageView.from_array(np.full(len(ids), ids.shape[1], np.int32))
    note = {"int8": "dynamic int8", "float32": "float32"}[form]
    if kind in ENCODERS:
        encoder = ctranslate2.Encoder(str(made), **settings)

        def encode() -> Mapping[str, Array]:
            found = encoder.forward_batch(words, lengths)
            pooled = {} if found.pooler_output is None else {"pooled": np.array(found.pooler_output)}
            return {"hidden": np.array(found.last_hidden_state), **pooled}

        return encode, f"{note}, the encoder"
    generator = ctranslate2.Generator(str(made), **settings)
    return lambda: {"logits": np.array(generator.forward_batch(words, lengths))}, note


def _with_words(folder: Path, place: Path) -> Path:
    """Return the folder, or a copy that also has the tokenizer's vocabulary, if CTranslate2 needs it."""
    if any((folder / name).exists() for name in _TOKENIZERS):
        return folder
    import tokenizers
    import transformers

    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).symlink_to(file.resolve())
    words = {f"w{i}": i for i in range(config_of(folder)["vocab_size"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
    marks = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "w0")
    tokenizer: Any = transformers.PreTrainedTokenizerFast
    tokenizer(tokenizer_object=made, **marks).save_pretrained(place)
    return place


def open_llama(spec: Spec) -> Opened:
    from llama_cpp import Llama

    if not spec["gguf"]:
        raise Unfit("llama.cpp can only run a GGUF file, and this model is not one")
    ids = tokens_of(spec, "llama.cpp")
    if len(ids) != 1:
        raise Unfit("llama.cpp can only run one row here: B=1")
    count = ids.shape[1]
    sizes = {"n_ctx": count, "n_batch": count, "n_ubatch": count}
    threads = {"n_threads": spec["threads"], "n_threads_batch": spec["threads"]}
    llm = Llama(spec["gguf"], logits_all=True, verbose=False, **sizes, **threads)
    words = ids[0].tolist()

    def run() -> Mapping[str, Array]:
        llm.reset()
        llm.eval(words)
        return {"logits": np.asarray(llm.scores)[None, :count]}

    return run, "the file's own blocks"


OPENERS: Mapping[str, Callable[[Spec], Opened]] = {
    "treadle": open_treadle,
    "eager": open_eager,
    "compile": open_compiled,
    "onnxruntime": open_onnxruntime,
    "onnxruntime-int8": open_onnxruntime,
    "openvino": open_openvino,
    "openvino-bf16": open_openvino,
    "openvino-int8": open_openvino,
    "ctranslate2": open_ctranslate2,
    "ctranslate2-int8": open_ctranslate2,
    "llama.cpp": open_llama,
}


# -- the machine -------------------------------------------------------------------------------------------------


def best(run: Run, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the minimum seconds of several runs: at least three, and at least half a second in total."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.5:
        times.append(timed(run, clock))
    return min(times)


def measured_read(threads: int) -> float:
    """Return the bytes per second of a plain read of 256 MiB from memory, on this number of threads."""
    parts = np.array_split(np.ones(1 << 26, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        return (1 << 28) / best(lambda: {str(i): x for i, x in enumerate(pool.map(np.max, parts))})


if __name__ == "__main__":
    main()
