"""Names that other libraries have for loading, compiling, running, saving and training a model, with the equivalents.

PyTorch, ONNX Runtime, Hugging Face, Keras and JAX; `other_spellings` has their functions of tensors. An equivalent
begins with code, so that a test can run it; a remark in words follows a #. `leave it out: ` begins one without code.
"""

from __future__ import annotations

import re

_COMPILE = "t.compile(model)"
_CUDA = 't.compile(model, target="cuda")  # or "cpu"'
_CPU = 't.compile(model, target="cpu")'
_EXPORT = (
    "from treadle.backends.onnx.exporter import export_onnx; "
    'export_onnx(exe.graph, exe.weights, "model.onnx")  # exe = t.compile(model)'
)
_QUANTIZE = 't.compile(model, quantize="int8-weights")  # or "int4", or "int8"'
_GENERATE = 't.load("folder").generate("Once upon a time")'
_SAMPLING = "t.Sampling(temperature=0.7, top_k=50, top_p=0.9, seed=1)"
_NAMED = "  # arrays by the names of the model's inputs"
_CALL = f"t.compile(model)(**inputs){_NAMED}"
_BATCHES = f"{_NAMED}, and targets; for each batch"
_STEP = f"t.Trainer(model).step(**batch){_BATCHES}"
_THREADS = 't.compile(model, target=t.Target("cpu", threads=4))'
_BF16 = 't.compile(model, dtype="bf16")'
_WEIGHTS = "t.compile(model, weights=weights)  # arrays by name, or a folder"
_TOKENIZER = 't.ModelSource.open("folder").tokenizer()  # t.load("folder") takes texts, and needs none'
_SAVE = 'exe.save("model.treadle")  # exe = t.compile(model)'
_PROFILE = 't.compile(model, backend="tvm").report(profile=10)  # times of 10 runs'
_VERIFY = "from treadle.verifying import verify_model; verify_model(model, emit=print)  # as `treadle verify` does"
_EXPLAIN = (
    "from treadle.explaining.fusion import explain_fusion; print(explain_fusion(model).text())  # `treadle explain` "
    "explains more"
)
_COMPARE = (
    "from treadle.comparing.builds import open_build; from treadle.comparing.differences import compare; "
    "print(compare(open_build(model), open_build(model)))  # as `treadle diff` does"
)
_BENCH = "leave it out: the command `treadle bench` compares a model with other tools"
_ROOFLINE = "leave it out: the command `treadle roofline` compares each kernel's time with the hardware's peak"
_TASKS = [
    "answer",
    "chat",
    "classify",
    "describe",
    "fill",
    "label",
    "match",
    "perplexity",
    "summarize",
    "tag",
    "transcribe",
    "translate",
]
_NO_MODES = "leave it out: a compiled model has no dropout, and computes no gradients"
_NO_MODULES = '@t.model  # on a function: x = t.linear(x, 64, name="f")'
_NUMBERS = "np.random.default_rng(0).standard_normal(8)  # outside of a model: a graph has no random numbers"
_SEED = "t.compile(model, seed=1)  # seeds random weights; t.Sampling(temperature=1.0, seed=1) seeds texts"


def _by_word(equivalents: dict[str, str]) -> dict[str, str]:
    return {word: spelled for words, spelled in equivalents.items() for word in words.split()}


ENTRY_WORDS = _by_word(
    {
        "quantize quantization quantize_dynamic quantize_static BitsAndBytesConfig": _QUANTIZE,
        "export export_onnx to_onnx onnx": _EXPORT,
        "from_onnx load_onnx InferenceSession": 't.compile("model.onnx")',
        "load_model from_pretrained pipeline from_hf from_huggingface": 't.load("folder")  # for tasks on texts or '
        'images; t.compile("folder") takes arrays',
        "from_gguf Llama": 't.load("model.gguf")',
        "from_safetensors safetensors": 't.compile("folder")',
        "tokenizer Tokenizer": _TOKENIZER,
        "jit script fx dynamo optimize build compile_model convert transpile": _COMPILE,
        "no_grad inference_mode enable_grad set_grad_enabled": f"{_NO_MODES}; in a model, t.stop_gradient(x)",
        "eval": _NO_MODES,
        "optim Adam adam adamw Optimizer RMSprop": "t.Trainer(model, optimizer=t.AdamW())  # or t.SGD()",
        "sgd": "t.Trainer(model, optimizer=t.SGD())",
        "lr_scheduler StepLR LinearLR CosineAnnealingLR OneCycleLR LambdaLR get_linear_schedule_with_warmup "
        "get_cosine_schedule_with_warmup": "t.Trainer(model, learning_rate=t.Schedule(3e-4, warmup=100))",
        "functional F": "t.relu  # functions are names of treadle itself",
        "Sequential ModuleList ModuleDict Module": _NO_MODULES,
        "device cuda device_put": _CUDA,
        "synchronize empty_cache": "leave it out: a call returns when its outputs are computed",
        "manual_seed seed set_seed": _SEED,
        "rand randn random randint normal uniform": _NUMBERS,
        "save_model save_pretrained save_file save_weights save_artifact": f'{_SAVE}; trainer.save("folder") writes '
        "weights alone",
        "load_state_dict load_file load_weights load_checkpoint": _WEIGHTS,
        "state_dict weights": "t.compile(model).weights",
        "grad value_and_grad backward autograd": f"{_STEP}: it computes the gradients and updates the weights",
        "DataLoader load_dataset": _STEP,
        "train fit TrainingArguments": _STEP,
        "checkpoint": "t.Trainer(model, gradient_checkpointing=True)",
        "clip_grad_norm_": "t.Trainer(model, max_grad_norm=1.0)",
        "vmap": 't.f32["B 8"]  # a type with a symbolic axis B: a model takes every size of it',
        "predict forward run inference": _CALL,
        "generate": _GENERATE,
        "GenerationConfig SamplingParams": _SAMPLING,
        "LLM": 't.load("folder").generate(["Once", "The"])',
        "Session": "t.compile(model).session(capacity=64)",
        "SessionOptions set_num_threads": _THREADS,
        "get_num_threads": "t.compile(model).target",
        "providers get_available_providers available_backends list_backends": 't.compile(model, backend="auto")  # the '
        "command `treadle doctor` lists what is installed",
        "is_available version": "t.__version__  # the command `treadle doctor` lists what is installed",
        "set_default_dtype get_default_dtype autocast amp": _BF16,
        "Config AutoConfig PretrainedConfig from_config": 't.compile(model, config={"dim": 16})',
        "fetch download": 't.fetch_model("minilm")',
        "hub snapshot_download hf_hub_download": 't.fetch_model("organization/name")',
        "profile profiler": _PROFILE,
        "lstm LSTM LSTMCell gru GRU GRUCell rnn RNN RNNCell": "leave it out: a recurrence over positions is one step, "
        "which is called in a Python loop (docs/dsl.md, What cannot be expressed)",
        "fft rfft ifft irfft stft": "leave it out: a transform is a product with constant matrices (docs/dsl.md, What "
        "cannot be expressed)",
        **{task: f't.load("folder").{task}  # a method of a loaded model, for a model of this task' for task in _TASKS},
        "verify": _VERIFY,
        "explain": _EXPLAIN,
        "compare": _COMPARE,
        "bench benchmark": _BENCH,
        "roofline": _ROOFLINE,
        "serve": "leave it out: the command `treadle serve` answers over HTTP",
        "doctor": "leave it out: the command `treadle doctor` lists what is installed",
        "launch": "leave it out: the command `treadle launch` starts ranks",
        "inspect summary": "print(t.compile(model).graph)",
        "loss": 't.Trainer(model, loss="cross-entropy")',
        "numpy asnumpy": "leave it out: a compiled model takes and returns NumPy arrays",
        "torch": "t.from_torch(module, (array,))  # module.eval() first; the arguments of its forward",
        "target targets": 't.Target("cpu", threads=4)',
        "zoo model_zoo list_models": 't.compile("gpt2", layers=2)  # a family of the zoo',
        "fake_quant": _QUANTIZE,
        "dtype": "t.f32  # or t.f64, t.f16, t.bf16, t.i64, t.i32, t.i16, t.i8, t.u8, t.boolean",
        "float8_e4m3fn float8_e5m2 f8 f8e4m3 fp8 float8 i4 u4 int4 uint4 u16 u32 u64 uint16 uint32 uint64 complex64 "
        "complex128 string": "leave it out: tensors "
        "have the dtypes t.f64, t.f32, t.f16, t.bf16, t.i64, t.i32, t.i16, t.i8, t.u8 and t.boolean; quantize= of "
        "t.compile stores weights in 8 or 4 bits",
        "distributed DistributedDataParallel DataParallel parallel shard": "leave it out: the command `treadle launch` "
        "starts ranks, and `treadle shard` plans them",
    }
)
"""Names of modules of other libraries, by the name after `t.`."""

_MODELS = re.compile(r"(Auto|TF|Flax|ORT)?Model(For\w+)?|\w+For[A-Z]\w+|\w+LMHeadModel|\w+Pipeline")
_AUTO = re.compile(r"Auto(Tokenizer|\w*Processor|FeatureExtractor)|\w+Tokenizer(Fast)?")


def entry_word(name: str) -> str | None:
    """Return the equivalent of a module's name in other libraries, also of a class of Hugging Face's; None if there is
    none.
    """
    if name not in ENTRY_WORDS and name != "Model":
        if _AUTO.fullmatch(name):
            return _TOKENIZER
        if _MODELS.fullmatch(name):
            return ENTRY_WORDS["from_pretrained"]
    return ENTRY_WORDS.get(name)


_ANY = {
    "eval train requires_grad_": _NO_MODES,
    "to cuda": _CUDA,
    "cpu": _CPU,
    "half bfloat16": _BF16,
    "float double": 't.compile(model, dtype="f32")',
    "quantize": _QUANTIZE,
    "export to_onnx export_onnx": _EXPORT,
    "load_state_dict": _WEIGHTS,
    "fit backward optimizer": _STEP,
    "compile": _COMPILE,
    "verify": _VERIFY,
    "explain": _EXPLAIN,
    "compare diff": _COMPARE,
    "bench benchmark": _BENCH,
    "roofline": _ROOFLINE,
    "generate": f"{_GENERATE}  # t.compile(model).session(capacity=64) takes token ids",
}

MODEL_ATTRIBUTES = _by_word(
    {
        **_ANY,
        "inspect summary": "print(t.compile(model).graph)",
        "state_dict parameters named_parameters": "t.compile(model).weights",
        "save save_pretrained": _SAVE,
        "forward predict run": _CALL,
    }
)
"""Attributes of a model in other libraries, which a declaration lacks."""

COMPILED_ATTRIBUTES = _by_word(
    {
        **_ANY,
        "state_dict parameters named_parameters": "exe.weights",
        "inspect summary": "print(exe.graph)",
        "save_pretrained": 'exe.save("model.treadle")',
        "forward predict": f"exe(**inputs){_NAMED}",
        "get_inputs input_names": "[port.name for port in exe.inputs]",
        "get_outputs output_names": "[port.name for port in exe.outputs]",
        "get_providers device": "exe.backend, exe.target",
        "config": "exe.options",
        "profile": _PROFILE,
    }
)
"""Attributes of a compiled model or a session of other libraries, which a compiled model lacks."""

_LOADED = 't.compile("folder")'
LOADED_ATTRIBUTES = _by_word(
    {
        "eval train requires_grad_": _NO_MODES,
        "to cuda": 't.load("folder", target="cuda")',
        "cpu": 't.load("folder", target="cpu")',
        "half bfloat16": 't.load("folder", dtype="bf16")',
        "float double": 't.load("folder", dtype="f32")',
        "quantize": 't.load("folder", quantize="int8-weights")',
        "tokenize decode tokenizer": _TOKENIZER,
        "encode encode_query encode_document": (
            'model.embed("a cat")  # a text as a vector; t.ModelSource.open("folder").tokenizer() has the token ids'
        ),
        "predict complete forward run": 'model.generate("Once upon a time")  # or the method of another task',
        "pipeline": 't.load("folder")',
        "graph": f"{_LOADED}.graph",
        "model": _LOADED,
        "config": 't.ModelSource.open("folder").config',
        "state_dict parameters named_parameters weights": f"{_LOADED}.weights",
        "save save_pretrained": f'{_LOADED}.save("model.treadle")',
        "similarity": 'model.embed("a cat") @ model.embed("a dog")',
    }
)
"""Attributes of a pipeline or a model of Hugging Face's, which a model that `t.load` returns lacks."""

TRAINER_ATTRIBUTES = _by_word(
    {
        "train fit": f"trainer.step(**batch){_BATCHES}",
        "backward": "leave it out: trainer.step computes the gradients and updates the weights",
        "eval loss": f"trainer.evaluate(**batch){_BATCHES}",
        "forward predict model": "trainer.compiled()",
        "state_dict parameters named_parameters": "trainer.weights",
        "load_state_dict load_state load load_checkpoint resume": 'trainer.restore("state.safetensors")  # a file of '
        "trainer.save_state",
        "save_model save_pretrained": 'trainer.save("trained")',
        "save_checkpoint": 'trainer.save_state("state.safetensors")',
        "to cuda cpu": "leave it out: training runs on the CPU",
        "learning_rate lr": "trainer.schedule(trainer.steps + 1)  # t.Trainer(model, learning_rate=0.01) sets it",
    }
)
"""Attributes of Hugging Face's trainer and of PyTorch's modules, which a trainer lacks."""

IMPORTED_ATTRIBUTES = _by_word(
    {
        **_ANY,
        "inspect summary": "print(imported.graph)",
        "state_dict parameters named_parameters": "imported.weights",
        "save save_pretrained": _SAVE,
        "forward predict run": _CALL,
    }
)
"""Attributes of a module of PyTorch, which the model that `t.from_torch` returns lacks."""

SESSION_ATTRIBUTES = _by_word(
    {
        "generate": "from treadle.runtime.generation import generate; list(generate(session, [[4, 3]], most=8))",
        "run forward append extend": "session.prefill({row: [4, 3]})  # row = session.open()",
        "get_inputs get_outputs": "t.compile(model).inputs  # and .outputs",
    }
)
"""Attributes of a session of other libraries, which a session of rows lacks."""

GRAPH_ATTRIBUTES = _by_word(
    {
        "nodes ops operations operators": "graph.main.nodes  # graph.walk() has the nodes of all functions",
        "inputs input": "graph.main.inputs",
        "outputs output": "graph.main.outputs",
        "code print_tabular print_readable print summary": "print(graph)",
        "weights initializers state_dict": "exe.weights  # graph.parameters are names and types",
    }
)
"""Attributes of a graph of PyTorch or ONNX, which a graph lacks."""

TOKENIZER_ATTRIBUTES = _by_word(
    {
        "decode batch_decode detokenize": "tokenizer.text([4, 3])",
        "encode_batch batch_encode_plus encode_plus": 'tokenizer.batch(["a", "b"])',
        "tokenize convert_ids_to_tokens id_to_token": '[tokenizer.token(n) for n in tokenizer.ids(["a b"])[0]]',
        "convert_tokens_to_ids token_to_id": 'tokenizer.id_of("a")',
        "vocab_size get_vocab_size": "tokenizer.size",
        "vocab get_vocab": "tokenizer.vocabulary()",
        "all_special_tokens special_tokens_map eos_token bos_token pad_token cls_token sep_token unk_token "
        "eos_token_id bos_token_id pad_token_id": "tokenizer.special_tokens()  # tokenizer.id_of(name) returns an id",
        "model_max_length": "tokenizer.max_tokens",
    }
)
"""Attributes of a tokenizer of Hugging Face, which a tokenizer lacks."""
