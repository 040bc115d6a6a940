"""CPU time and memory of models in quantized folders, compared with a Q4_0 GGUF file and with `int4_groups(32)`.

    python benchmarks/quantized_folders.py --layers 4 --forms gptq nf4 fp8 --rounds 3

Writes a random Llama of the given size in each format, piece by piece. Each round opens every model in a process of its
own, in turns, with packed panels not yet in the cache (`cold`) or in the cache. A row has

    MB         size of the file
    open s     CPU seconds of `treadle.compile(path)`: to read the model and its blocks, and to bind the panels that
               kernels read, including the cache file of panels; s/GB: per GB of the file
    peak/file  growth of the peak memory, after a tiny model has been compiled, relative to the file
    step ms    CPU milliseconds of the fastest decoding step of one row; ms/GB: per GB of the file

Times are CPU times of the process (`time.process_time`), so that other processes disturb them less; the least of the
rounds counts. Without --layers, the model has 1.1 billion weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

DIM, HIDDEN, HEADS, KV, VOCAB = 2048, 5632, 32, 4, 1024
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FORMS = ("q4_0", "int4_groups", "gptq", "order", "awq", "nf4", "fp8", "mxfp4", "int8")
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def linear(layers: int) -> Iterator[tuple[str, int, int]]:
    """Yield the name, outputs and inputs of each linear layer."""
    kv = DIM // HEADS * KV
    for i in range(layers):
        for name, n, k in (
            ("self_attn.q_proj", DIM, DIM),
            ("self_attn.k_proj", kv, DIM),
            ("self_attn.v_proj", kv, DIM),
            ("self_attn.o_proj", DIM, DIM),
            ("mlp.gate_proj", HIDDEN, DIM),
            ("mlp.up_proj", HIDDEN, DIM),
            ("mlp.down_proj", DIM, HIDDEN),
        ):
            yield f"model.layers.{i}.{name}", n, k


def parts(form: str, n: int, k: int, rng: np.random.Generator) -> dict[str, tuple[str, Array]]:
    """Return the tensors of a module's weight: dtype and array by the end of the name."""

    def drawn(*shape: int) -> Array:
        return np.frombuffer(rng.bytes(int(np.prod(shape))), np.uint8).reshape(shape)

    def scales(*shape: int, dtype: Any = np.float16) -> Array:
        return (0.0005 + 0.001 * rng.random(shape)).astype(dtype)

    if form in ("gptq", "int4_groups", "order"):
        group = 32 if form == "int4_groups" else 128
        zeros = np.full((k // group, n // 8), 0x77777777, np.int32)
        order = np.arange(k) // group
        if form == "order":
            order = np.random.default_rng(k).permutation(order)
        return {
            ".qweight": ("I32", drawn(k // 8, 4 * n).view(np.int32)),
            ".qzeros": ("I32", zeros),
            ".scales": ("F16", scales(k // group, n)),
            ".g_idx": ("I32", order.astype(np.int32)),
        }
    if form == "awq":
        return {
            ".qweight": ("I32", drawn(k, n // 2).view(np.int32)),
            ".qzeros": ("I32", drawn(k // 128, n // 2).view(np.int32)),
            ".scales": ("F16", scales(k // 128, n)),
        }
    if form == "nf4":
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, k]}
        return {
            ".weight": ("U8", drawn(n * k // 2, 1)),
            ".weight.absmax": ("F32", scales(n * k // 64, dtype=np.float32)),
            ".weight.quant_map": ("F32", np.array(NF4, np.float32)),
            ".weight.quant_state.bitsandbytes__nf4": ("U8", np.frombuffer(json.dumps(state).encode(), np.uint8)),
        }
    if form == "fp8":
        values = drawn(n, k).copy()
        values[(values & 0x7F) == 0x7F] = 0
        blocks = scales(-(-n // 128), k // 128, dtype=np.float32) / np.float32(100)
        return {".weight": ("F8_E4M3", values), ".weight_scale_inv": ("F32", blocks)}
    if form == "mxfp4":
        exponents = rng.integers(114, 118, (n, k // 32)).astype(np.uint8)
        return {".weight_packed": ("U8", drawn(n, k // 2)), ".weight_scale": ("U8", exponents)}
    assert form == "int8"
    return {".weight": ("I8", drawn(n, k).view(np.int8)), ".weight_scale": ("F32", scales(n, 1, dtype=np.float32) / 16)}


def settings(form: str) -> dict[str, Any]:
    """Return the quantization settings of a folder."""
    if form in ("gptq", "int4_groups", "order"):
        return {"quant_method": "gptq", "bits": 4, "group_size": 32 if form == "int4_groups" else 128}
    if form == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    if form == "nf4":
        return {"quant_method": "bitsandbytes", "load_in_4bit": True}
    if form == "fp8":
        return {"quant_method": "fp8", "weight_block_size": [128, 128]}
    kind = "mxfp4-pack-quantized" if form == "mxfp4" else "int-quantized"
    bits = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    scheme = bits if form == "mxfp4" else {"num_bits": 8, "type": "int", "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}


def others(layers: int, rng: np.random.Generator) -> dict[str, Array]:
    """Return the tensors that are not quantized, in float16."""
    made = {
        f"model.layers.{i}.{name}.weight": np.ones(DIM, np.float16)
        for i in range(layers)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    made["model.norm.weight"] = np.ones(DIM, np.float16)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        made[name] = (rng.standard_normal((VOCAB, DIM), np.float32) * 0.02).astype(np.float16)
    return made


def write_folder(folder: Path, form: str, layers: int) -> Path:
    """Write a folder, one module at a time."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    header: dict[str, Any] = {}
    with (folder / "data").open("wb") as file:

        def put(name: str, dtype: str, array: Array) -> None:
            begin = file.tell()
            file.write(np.ascontiguousarray(array).data)
            header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, file.tell()]}

        for name, array in others(layers, rng).items():
            put(name, "F16", array)
        for module, n, k in linear(layers):
            for part, (dtype, array) in parts(form, n, k, rng).items():
                put(module + part, dtype, array)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as to, (folder / "data").open("rb") as data:
        to.write(len(text).to_bytes(8, "little") + text)
        while piece := data.read(1 << 24):
            to.write(piece)
    (folder / "data").unlink()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": DIM, "intermediate_size": HIDDEN,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV, "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "tie_word_embeddings": False, "hidden_act": "silu",
        "quantization_config": settings(form),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_gguf(path: Path, layers: int) -> Path:
    """Write the same model with random Q4_0 blocks."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_context_length(2048)
    writer.add_embedding_length(DIM)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(DIM // HEADS)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([1] * VOCAB)
    tops = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

    def named(name: str) -> str:
        stem = name.removesuffix(".weight")
        if stem in tops:
            return f"{tops[stem]}.weight"
        _, _, i, module = stem.split(".", 3)
        return f"blk.{i}.{NAMES[module]}.weight"

    for name, array in others(layers, rng).items():
        writer.add_tensor(named(name), array.astype(np.float32) if array.ndim == 1 else array)
    record = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
    for module, n, k in linear(layers):
        blocks = np.empty(n * k // 32, record)
        blocks["d"] = 0.0005 + 0.001 * rng.random(len(blocks))
        blocks["qs"] = np.frombuffer(rng.bytes(len(blocks) * 16), np.uint8).reshape(-1, 16)
        raw = blocks.view(np.uint8).reshape(n, -1)
        writer.add_tensor(named(module), raw, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def measured(place: str) -> dict[str, float]:
    """Measure one model, in this process."""
    import treadle
    from treadle.backends.tvm.panel_memory import finish_writing
    from treadle.benching.serving import peak_bytes

    treadle.compile("llama", layers=1, dim=64, heads=4, kv_heads=2, hidden=64, vocab=32, backend="tvm")(
        tokens=np.array([[1, 2]])
    )
    base = peak_bytes()
    started = time.process_time()
    made = treadle.compile(place, backend="tvm", target="cpu")
    finish_writing()
    opened = time.process_time() - started
    peak = peak_bytes() - base
    session = made.session(rows=1, capacity=64)
    row = session.open()
    session.prefill({row: [1, 2, 3, 4]})
    steps = []
    for token in range(24):
        started = time.process_time()
        session.step({row: token})
        steps.append(time.process_time() - started)
    return {
        "open": opened,
        "peak": peak,
        "whole": peak_bytes() - base,
        "step": float(np.median(steps)),
        "best": min(steps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure models in quantized folders.")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--forms", nargs="*", default=list(FORMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where models are written, and kept")
    parser.add_argument("--cold", action="store_true", help="pack panels again in every process; kernels are cached")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measured(chosen.one)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.folder or Path(scratch)
        folder.mkdir(exist_ok=True)
        places: dict[str, Path] = {}
        for form in chosen.forms:
            place = folder / (f"{form}-{chosen.layers}" + ".gguf" * (form == "q4_0"))
            if not place.exists():
                write_gguf(place, chosen.layers) if form == "q4_0" else write_folder(place, form, chosen.layers)
            places[form] = place
        cache = Path(scratch) / "cache"
        found: dict[str, list[dict[str, float]]] = {form: [] for form in places}
        for _ in range(chosen.rounds):
            for form, place in places.items():
                if chosen.cold:
                    shutil.rmtree(cache / "panels", ignore_errors=True)
                command = [sys.executable, __file__, "--one", str(place)]
                more = {"TREADLE_CACHE": str(cache)}
                text = subprocess.run(
                    command, check=True, capture_output=True, text=True, env={**os.environ, **more}
                ).stdout
                found[form].append(json.loads(text.splitlines()[-1]))
        sizes = {
            f: p.stat().st_size if p.is_file() else (p / "model.safetensors").stat().st_size for f, p in places.items()
        }
        best = {form: {key: min(row[key] for row in rows) for key in rows[0]} for form, rows in found.items()}
        print("form              MB   open s    s/GB peak/file  step ms   ms/GB")
        for form, row in best.items():
            mb = sizes[form] / 1e6
            print(
                f"{form:12} {mb:7.0f} {row['open']:8.3f} {row['open'] / mb * 1e3:7.2f} "
                f"{row['peak'] / sizes[form]:9.2f} {row['best'] * 1e3:8.2f} {row['best'] / mb * 1e6:7.1f}"
            )


if __name__ == "__main__":
    main()
