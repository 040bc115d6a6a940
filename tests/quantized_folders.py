"""Small model folders whose linear layers are quantized, written by encoders that share no code with the readers.

Each encoder draws integers, zeros and scales, packs them as the format's layout table says, one integer at a time, and
returns the numbers that they mean: f32[N, K].
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
Stored = dict[str, Any]
"""Tensors by name; a text is metadata of the file."""
Encoder = Callable[[np.random.Generator, int, int], tuple[Stored, Array]]
"""Returns the tensors of a module's weight, by the end of their names, and its numbers, for N outputs and K inputs."""

E4M3, E8M0, BF16 = (np.dtype(getattr(ml_dtypes, n)) for n in ("float8_e4m3fn", "float8_e8m0fnu", "bfloat16"))
DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0",
    "int8": "I8", "uint8": "U8", "int16": "I16", "int32": "I32", "int64": "I64", "float64": "F64",
}  # fmt: skip
DIM, HIDDEN, VOCAB, LAYERS, HEADS = 64, 128, 96, 2, 4
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": DIM, "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 2, "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
BERT = {
    "model_type": "bert", "architectures": ["BertModel"], "hidden_size": DIM, "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": VOCAB, "max_position_embeddings": 64,
    "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": DIM, "n_layer": LAYERS, "n_head": HEADS,
    "n_positions": 64, "vocab_size": VOCAB, "activation_function": "gelu_new",
}  # fmt: skip


def layers(config: Mapping[str, Any]) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, ...]]]:
    """Return the linear layers of a model as (N, K), and the shapes of its other tensors."""
    linear: dict[str, tuple[int, int]] = {}
    other: dict[str, tuple[int, ...]] = {}
    kind = config["model_type"]
    for i in range(LAYERS):
        if kind == "bert":
            base = f"encoder.layer.{i}"
            for name in (
                "attention.self.query",
                "attention.self.key",
                "attention.self.value",
                "attention.output.dense",
            ):
                linear[f"{base}.{name}"] = (DIM, DIM)
            linear[f"{base}.intermediate.dense"] = (HIDDEN, DIM)
            linear[f"{base}.output.dense"] = (DIM, HIDDEN)
            for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
                other |= {f"{base}.{norm}.{part}": (DIM,) for part in ("weight", "bias")}
        elif kind == "gpt2":
            base = f"transformer.h.{i}"
            linear[f"{base}.attn.c_attn"] = (3 * DIM, DIM)
            linear[f"{base}.attn.c_proj"] = (DIM, DIM)
            linear[f"{base}.mlp.c_fc"] = (4 * DIM, DIM)
            linear[f"{base}.mlp.c_proj"] = (DIM, 4 * DIM)
            other |= {f"{base}.{norm}.{part}": (DIM,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
        else:
            base = f"model.layers.{i}"
            for name, n in (("q_proj", DIM), ("k_proj", DIM // 2), ("v_proj", DIM // 2), ("o_proj", DIM)):
                linear[f"{base}.self_attn.{name}"] = (n, DIM)
                if kind == "qwen2" and name != "o_proj":
                    other[f"{base}.self_attn.{name}.bias"] = (n,)
            linear |= {f"{base}.mlp.{name}": (HIDDEN, DIM) for name in ("gate_proj", "up_proj")}
            linear[f"{base}.mlp.down_proj"] = (DIM, HIDDEN)
            other |= {f"{base}.{norm}.weight": (DIM,) for norm in ("input_layernorm", "post_attention_layernorm")}
    if kind == "bert":
        other |= {f"{name}.bias": (n,) for name, (n, _) in linear.items()}
        other |= {f"embeddings.LayerNorm.{part}": (DIM,) for part in ("weight", "bias")}
        other["embeddings.word_embeddings.weight"] = (VOCAB, DIM)
        other["embeddings.position_embeddings.weight"] = (64, DIM)
        other["embeddings.token_type_embeddings.weight"] = (2, DIM)
        other |= {"pooler.dense.weight": (DIM, DIM), "pooler.dense.bias": (DIM,)}
    elif kind == "gpt2":
        other |= {f"{name}.bias": (n,) for name, (n, _) in linear.items()}
        other |= {"transformer.wte.weight": (VOCAB, DIM), "transformer.wpe.weight": (64, DIM)}
        other |= {f"transformer.ln_f.{part}": (DIM,) for part in ("weight", "bias")}
    else:
        other |= {
            "model.embed_tokens.weight": (VOCAB, DIM),
            "model.norm.weight": (DIM,),
            "lm_head.weight": (VOCAB, DIM),
        }
    return linear, other


def write_folder(
    folder: Path,
    encode: Encoder,
    quantization: Mapping[str, Any] | None,
    config: Mapping[str, Any] = LLAMA,
    change: Callable[[Stored], None] = lambda tensors: None,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Write a folder with quantized linear layers, and the same model with their numbers in float32; return both.

    change  changes the tensors of the quantized folder before they are written
    """
    rng = np.random.default_rng(seed)
    linear, other = layers(config)
    plain: Stored = {}
    for name, shape in other.items():
        values = rng.standard_normal(shape) * 0.1
        plain[name] = (values + ("norm" in name.lower() or ".ln_" in name)).astype(np.float32)
    stored, numbers = dict(plain), dict(plain)
    for module, (n, k) in linear.items():
        parts, meant = encode(rng, n, k)
        stored |= {
            module + p: a if isinstance(a, str) or not a.ndim else np.ascontiguousarray(a) for p, a in parts.items()
        }
        turned = meant.T if config["model_type"] == "gpt2" else meant
        numbers[f"{module}.weight"] = np.ascontiguousarray(turned)
    change(stored)
    quantized, wide = folder / "quantized", folder / "plain"
    for place, tensors, settings in ((quantized, stored, quantization), (wide, numbers, None)):
        place.mkdir(parents=True)
        save_tensors(tensors, place / "model.safetensors")
        more = {} if settings is None else {"quantization_config": settings}
        (place / "config.json").write_text(json.dumps({**config, **more}))
    return quantized, wide


def save_tensors(tensors: Stored, path: Path) -> None:
    """Write a safetensors file. Narrow floats are those of ml_dtypes. A text in place of a tensor is metadata."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        if isinstance(array, str):
            header["__metadata__"][name] = array
            continue
        begin = len(data)
        data += np.ascontiguousarray(array).tobytes()
        offsets = [begin, len(data)]
        header[name] = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def scales_of(rng: np.random.Generator, *shape: int, dtype: Any = np.float16) -> Array:
    return (0.01 + 0.02 * rng.random(shape)).astype(dtype)


def packed(q: Array, bits: int) -> Array:
    """Pack integers along the last axis into words, the lowest first."""
    rows = q.reshape(-1, q.shape[-1])
    made = np.zeros((len(rows), q.shape[-1] * bits // 32), np.uint32)
    for row, values in zip(made, rows, strict=True):
        wide = 0
        for i, value in enumerate(values):
            wide |= int(value) << (bits * i)
        row[:] = [(wide >> (32 * i)) & 0xFFFFFFFF for i in range(len(row))]
    return made.view(np.int32).reshape(*q.shape[:-1], -1)


def meaning(q: Array, zeros: Array, scales: Array, groups: Array) -> Array:
    """Return scale[n, g] (q[n, k] - zero[n, g]), for the group of each k."""
    made = np.empty(q.shape, np.float32)
    for k, g in enumerate(groups):
        made[:, k] = scales[:, g].astype(np.float32) * (q[:, k].astype(np.float32) - zeros[:, g].astype(np.float32))
    return made


def gptq(
    bits: int = 4,
    group: int = 32,
    *,
    symmetric: bool = True,
    version: int = 1,
    order: str = "",
    index: bool = True,
) -> Encoder:
    """Return an encoder to GPTQ's layout; group -1: a whole row.

    order  "shared": inputs have groups in a random order, the same for all modules with the same number of inputs;
           "own": in an order of each module; "unequal": groups have different numbers of inputs; "": in order
    """

    def encode(rng: np.random.Generator, n: int, k: int) -> tuple[Stored, Array]:
        size = k if group == -1 else group
        count = k // size
        q = rng.integers(0, 1 << bits, (n, k))
        zeros = rng.integers(1, (1 << bits) - 1, (n, count)) if not symmetric else np.full((n, count), 1 << (bits - 1))
        scales = scales_of(rng, n, count)
        groups = np.arange(k) // size
        if order:
            groups = (np.random.default_rng(k) if order == "shared" else rng).permutation(groups)
        if order == "unequal":
            groups[groups == 0] = 1
            groups[0] = 0
        parts = {
            ".qweight": packed(q, bits).T,
            ".qzeros": packed((zeros - (version == 1)).T, bits),
            ".scales": scales.T,
        }
        if index:
            parts[".g_idx"] = groups.astype(np.int32)
        return parts, meaning(q, zeros, scales, groups)

    return encode


def awq(group: int = 32, version: str = "gemm") -> Encoder:
    """Return an encoder to AWQ's layouts."""

    def words(q: Array) -> Array:
        """Pack [m, N]: nibble i of word j is column 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[i]."""
        made = np.zeros((len(q), q.shape[1] // 8), np.uint32)
        for row in range(len(q)):
            for j in range(made.shape[1]):
                for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                    made[row, j] |= np.uint32(int(q[row, 8 * j + column]) << (4 * i))
        return made.view(np.int32)

    def encode(rng: np.random.Generator, n: int, k: int) -> tuple[Stored, Array]:
        count = k // group
        q, zeros, scales = rng.integers(0, 16, (n, k)), rng.integers(0, 16, (n, count)), scales_of(rng, n, count)
        meant = meaning(q, zeros, scales, np.arange(k) // group)
        if version == "gemm":
            return {".qweight": words(q.T), ".qzeros": words(zeros.T), ".scales": scales.T}, meant
        width = -(-count // 8)
        padding = ((0, 0), (0, 8 * width - count))
        wide, padded = np.pad(zeros, padding), np.pad(scales, padding)
        return {".qweight": packed(q, 4), ".qzeros": packed(wide, 4), ".scales": padded}, meant

    return encode


def compressed(
    bits: int = 4,
    group: int | None = 32,
    *,
    symmetric: bool = True,
    dtype: Any = np.float16,
    order: bool = False,
    tensor: bool = False,
) -> Encoder:
    """Return an encoder to pack-quantized; None: a group is a whole row."""

    def encode(rng: np.random.Generator, n: int, k: int) -> tuple[Stored, Array]:
        count = k // (group or k)
        low = -(1 << (bits - 1))
        q = rng.integers(low, -low, (n, k))
        zeros = np.zeros((n, count), np.int64) if symmetric else rng.integers(low, -low, (n, count))
        scales = scales_of(rng, n, count, dtype=dtype)
        groups = np.arange(k) // (group or k)
        if order:
            groups = rng.permutation(groups)
        parts = {
            ".weight_packed": packed(q - low, bits),
            ".weight_scale": scales,
            ".weight_shape": np.array([n, k], np.int64),
        }
        if not symmetric:
            parts[".weight_zero_point"] = packed((zeros - low).T, bits).T
        if order:
            parts[".weight_g_idx"] = groups.astype(np.int32)
        return parts, meaning(q, zeros, scales, groups)

    return encode


def integers(strategy: str = "channel", *, symmetric: bool = True, static: bool = False) -> Encoder:
    """Return an encoder to int-quantized; `static`: with a scale and a zero of inputs."""

    def encode(rng: np.random.Generator, n: int, k: int) -> tuple[Stored, Array]:
        shapes = {"channel": (n, 1), "tensor": (1,), "group": (n, k // 32), "block": (-(-n // 48), -(-k // 48))}
        shape = shapes[strategy]
        q = rng.integers(-128, 128, (n, k))
        zeros = np.zeros(shape, np.int64) if symmetric else rng.integers(-128, 128, shape)
        scales = scales_of(rng, *shape, dtype=BF16)
        parts = {".weight": q.astype(np.int8), ".weight_scale": scales}
        if not symmetric:
            parts[".weight_zero_point"] = zeros.astype(np.int8)
        if static:
            parts |= {".input_scale": np.full(1, 0.03, BF16), ".input_zero_point": np.full(1, 3, np.int8)}
        at = np.indices((n, k))
        meant = (q - pick(zeros, strategy, at)).astype(np.float32) * pick(scales, strategy, at).astype(np.float32)
        return parts, meant

    return encode


def pick(values: Array, strategy: str, at: Array, tall: int = 48, wide: int = 48) -> Array:
    """Return the value of each element [n, k] of a matrix, from one value per row, tensor, group of 32 or block."""
    n, k = at
    if strategy == "tensor":
        return np.broadcast_to(values.reshape(()), n.shape)
    if strategy == "channel":
        return values.reshape(-1)[n]
    return values[n, k // 32] if strategy == "group" else values[n // tall, k // wide]


def floats(
    strategy: str = "channel", name: str = ".weight_scale", dtype: Any = np.float32, block: tuple[int, int] = (48, 48)
) -> Encoder:
    """Return an encoder to e4m3 floats with scales."""

    def encode(rng: np.random.Generator, n: int, k: int) -> tuple[Stored, Array]:
        tall, wide = block
        shapes = {"channel": (n, 1), "tensor": (1,), "group": (n, k // 32), "block": (-(-n // tall), -(-k // wide))}
        values = (rng.standard_normal((n, k)) * 8).astype(E4M3)
        scales = scales_of(rng, *shapes[strategy], dtype=np.float32).astype(dtype)
        each = pick(scales.astype(np.float32), strategy, np.indices((n, k)), tall, wide)
        return {".weight": values, name: scales}, values.astype(np.float32) * each

    return encode


NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 0.5, 2 / 12, 0.25]


def bitsandbytes(kind: str = "nf4", block: int = 64, *, nested: bool = False) -> Encoder:
    """Return an encoder to the 4-bit layout of bitsandbytes."""

    def encode(rng: np.random.Generator, n: int, k: int) -> tuple[Stored, Array]:
        table = np.array(NF4 if kind == "nf4" else [*FP4, *[-x for x in FP4]], np.float32)
        codes = rng.integers(0, 16, n * k)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [n, k]}
        parts = {
            ".weight": np.array([[16 * a + b] for a, b in codes.reshape(-1, 2)], np.uint8),
            ".weight.quant_map": table,
        }
        count = -(-n * k // block)
        if nested:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
            parts[".weight.absmax"] = rng.integers(0, 256, count).astype(np.uint8)
            parts[".weight.nested_quant_map"] = np.linspace(-1, 1, 256, dtype=np.float32)
            parts[".weight.nested_absmax"] = scales_of(rng, -(-count // 256), dtype=np.float32)
            values = parts[".weight.nested_quant_map"][parts[".weight.absmax"]]
            absmax = values * parts[".weight.nested_absmax"][np.arange(count) // 256] + np.float32(0.05)
        else:
            absmax = parts[".weight.absmax"] = scales_of(rng, count, dtype=np.float32)
        text = json.dumps(state).encode()
        parts[f".weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(text, np.uint8)
        return parts, (table[codes] * absmax[np.arange(n * k) // block]).reshape(n, k)

    return encode


def llm_int8() -> Encoder:
    """Return an encoder to the 8-bit layout of bitsandbytes."""

    def encode(rng: np.random.Generator, n: int, k: int) -> tuple[Stored, Array]:
        q, largest = rng.integers(-127, 128, (n, k)), scales_of(rng, n, dtype=np.float32) * np.float32(127)
        parts = {".weight": q.astype(np.int8), ".SCB": largest, ".weight_format": np.zeros((), np.uint8)}
        return parts, q.astype(np.float32) * (largest / np.float32(127))[:, None]

    return encode


def torchao(kind: str = "Int8Tensor", group: int | None = None, *, bits: int = 8, symmetric: bool = True) -> Encoder:
    """Return an encoder to a tensor of torchao; None: a group is a whole row."""

    def encode(rng: np.random.Generator, n: int, k: int) -> tuple[Stored, Array]:
        size, low = group or k, -(1 << (bits - 1))
        data: dict[str, Any] = {"block_size": [1, size], "dtype": {"_type": "torch.dtype", "_data": "float32"}}
        scales, groups = scales_of(rng, n, k // size, dtype=np.float32), np.arange(k) // size
        parts: Stored = {"._weight_scale": scales}
        if kind == "Float8Tensor":
            q = (rng.standard_normal((n, k)) * 8).astype(E4M3)
            parts["._weight_qdata"] = q
            zeros = np.zeros(scales.shape, np.int8)
        else:
            q = rng.integers(low, -low, (n, k)).astype(np.int8)
            zeros = (rng.integers(low, -low, scales.shape) * (not symmetric)).astype(np.int8)
            parts |= {"._weight_qdata": q, "._weight_zero_point": zeros}
            if kind != "Int8Tensor":
                data["target_dtype"] = {"_type": "torch.dtype", "_data": f"int{bits}"}
        names = [part.removeprefix("._weight_") for part in parts]
        parts[".weight"] = json.dumps({"_type": kind, "_data": data, "_tensor_data_names": names})
        return parts, meaning(q, zeros, scales, groups)

    return encode


def experts(rng: np.random.Generator, count: int, n: int, k: int) -> tuple[Stored, Array]:
    """Return the blocks and scales of the matrices of experts in mxfp4, and their numbers."""
    codes, exponents = rng.integers(0, 16, (count, n, k)), rng.integers(118, 123, (count, n, k // 32))
    table = np.array([*E2M1, *[-x for x in E2M1]], np.float32)
    packed_codes = (codes[..., ::2] + 16 * codes[..., 1::2]).reshape(count, n, k // 32, 16)
    parts = {"_blocks": packed_codes.astype(np.uint8), "_scales": exponents.astype(np.uint8)}
    return parts, table[codes] * np.repeat((2.0 ** (exponents - 127.0)).astype(np.float32), 32, axis=-1)


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def small_floats(group: int) -> Encoder:
    """Return an encoder to nvfp4 (groups of 16) or mxfp4 (groups of 32)."""

    def encode(rng: np.random.Generator, n: int, k: int) -> tuple[Stored, Array]:
        table = np.array([*E2M1, *[-x for x in E2M1]], np.float32)
        codes = rng.integers(0, 16, (n, k))
        parts = {".weight_packed": (codes[:, ::2] + 16 * codes[:, 1::2]).astype(np.uint8)}
        if group == 16:
            scales = (1 + 400 * rng.random((n, k // 16))).astype(E4M3)
            parts |= {".weight_scale": scales, ".weight_global_scale": np.array([3000.0], np.float32)}
            each = scales.astype(np.float32) / np.float32(3000)
        else:
            exponents = rng.integers(118, 123, (n, k // 32))
            parts[".weight_scale"] = exponents.astype(np.uint8)
            each = (2.0 ** (exponents - 127.0)).astype(np.float32)
        return parts, table[codes] * np.repeat(each, group, axis=1)

    return encode


def compressed_settings(format: str, **weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**scheme, **weights}}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def gptq_settings(bits: int = 4, group: int = 32, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True, **more}
