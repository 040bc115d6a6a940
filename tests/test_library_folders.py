"""Folders that the libraries of quantized formats write themselves: compressed-tensors, bitsandbytes, torchao, and
transformers for fp8.

Our weights are bitwise the library's own float32 numbers, and the logits are those of a folder with these numbers. The
libraries are not among the project's dependencies: without one of them, its tests are skipped.

    python -m venv lab --system-site-packages
    lab/bin/pip install --no-deps compressed-tensors torchao bitsandbytes accelerate psutil loguru
    lab/bin/python -m pytest tests/test_library_folders.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import treadle
from tests.quantized_folders import BERT, LLAMA, QWEN2
from treadle.frontends.huggingface import open_checkpoint
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.quantized.quantized_checkpoint import QuantizedCheckpoint, open_quantized
from treadle.ir.ops.rounding import FakeQuantize, RoundTo

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = np.array([[3, 14, 15, 92, 65, 35, 89, 79], [27, 18, 28, 18, 28, 45, 90, 45]])
Numbers = dict[str, Any]
Write = Callable[[Any, Path], Numbers]
"""Quantizes a model and writes it to a folder. Returns the library's float32 numbers of each quantized module."""


def drawn_model(config: dict[str, Any]) -> Any:
    """Return a model of Hugging Face with random weights of about 0.1, in float32."""
    torch.manual_seed(0)
    known = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    chosen = transformers.AutoConfig.for_model(config["model_type"], **known)
    kind = transformers.AutoModel if config["model_type"] == "bert" else transformers.AutoModelForCausalLM
    model = kind.from_config(chosen, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape) * 0.05)
    return model


def layers_of(model: Any) -> dict[str, Any]:
    """Return the linear layers inside a model's blocks, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layer" in n}


def save(model: Any, folder: Path, tensors: dict[str, Any], settings: Any, metadata: Any = None) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    kept = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt", **(metadata or {})})
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}, default=str))


# -- the libraries -----------------------------------------------------------------------------------------------------


def compressed(format: str, **weights: Any) -> Write:
    def write(model: Any, folder: Path) -> Numbers:
        pytest.importorskip("compressed_tensors")
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.lifecycle.forward import dequantize
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), format=format)
        compressor = BaseCompressor.get_value_from_registry(format)
        tensors, numbers = dict(model.state_dict()), Numbers()
        for name, layer in layers_of(model).items():
            weight, args = layer.weight.detach(), scheme.weights
            rows, size = weight.shape
            held = {"weight": weight}
            group = args.group_size or size
            if args.strategy == "block":
                tall, wide = args.block_structure
                parts = weight.reshape(rows // tall, tall, size // wide, wide).transpose(1, 2).flatten(2)
            else:
                parts = weight.reshape(1, 1, -1) if args.strategy == "tensor" else weight.reshape(rows, -1, group)
            more = {}
            if args.strategy == "tensor_group" and format.startswith("nvfp4"):
                more["global_scale"] = held["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
            scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args, **more)
            held |= {"weight_scale": scale, "weight_zero_point": zero}
            if args.strategy == "tensor":
                held["weight_scale"], held["weight_zero_point"] = scale.reshape(1), zero.reshape(1)
            packed = compressor.compress(held, scheme)
            if format.startswith("nvfp4"):  # `decompress` returns bfloat16
                values = unpack_fp4_from_uint8(packed["weight_packed"], rows, size, dtype=torch.float32)
                by = packed["weight_scale"].float()
                numbers[name] = dequantize(values, by, args=args, global_scale=packed["weight_global_scale"])
            else:
                numbers[name] = compressor.decompress(packed, scheme)["weight"]
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{part}": tensor for part, tensor in packed.items()}
        group_settings = {
            "targets": ["Linear"],
            "weights": json.loads(scheme.weights.model_dump_json()),
            "format": format,
        }
        settings = {
            "quant_method": "compressed-tensors",
            "format": format,
            "config_groups": {"group_0": group_settings},
            "ignore": ["lm_head", "pooler.dense"],
            "quantization_status": "compressed",
        }
        save(model, folder, tensors, settings)
        return numbers

    return write


def bitsandbytes(kind: str, *, nested: bool = False) -> Write:
    def write(model: Any, folder: Path) -> Numbers:
        bnb = pytest.importorskip("bitsandbytes")
        tensors, numbers = dict(model.state_dict()), Numbers()
        for name, layer in layers_of(model).items():
            if kind == "int8":
                made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, False, has_fp16_weights=False)
                made.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
                made = made.to("cpu")
                made.weight._quantize("cpu") if made.weight.SCB is None else None
                numbers[name] = bnb.functional.int8_vectorwise_dequant(made.weight.data, made.weight.SCB)
            else:
                made = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, False, quant_type=kind, compress_statistics=nested
                )
                weight = bnb.nn.Params4bit(
                    layer.weight.data.clone(),
                    requires_grad=False,
                    quant_type=kind,
                    compress_statistics=nested,
                    module=made,
                )
                made.weight = weight._quantize("cpu")
                numbers[name] = bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{part}": tensor for part, tensor in made.state_dict().items()}
        eight = kind == "int8"
        options = {} if eight else {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}
        settings = transformers.BitsAndBytesConfig(load_in_8bit=eight, load_in_4bit=not eight, **options).to_dict()
        save(model, folder, tensors, settings)
        return numbers

    return write


def torchao(make: Callable[[Any], Any]) -> Write:
    """`make` returns the configuration, from the package."""

    def write(model: Any, folder: Path) -> Numbers:
        pytest.importorskip("torchao")
        from torchao import quantization
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        config, chosen = make(quantization), layers_of(model)
        quantization.quantize_(model, config, filter_fn=lambda module, name: name in chosen)
        numbers = {name: module.weight.dequantize() for name, module in model.named_modules() if name in chosen}
        tensors, metadata = flatten_tensor_state_dict(model.state_dict())
        save(model, folder, tensors, transformers.TorchAoConfig(config).to_dict(), metadata)
        return numbers

    return write


def fp8(block: tuple[int, int], scale: str = "float") -> Write:
    def write(model: Any, folder: Path) -> Numbers:
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

        config = transformers.FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale)
        of = SimpleNamespace(quantization_config=config)
        tensors, numbers = dict(model.state_dict()), Numbers()
        for name in layers_of(model):
            made = Fp8Quantize(of).convert({f"{name}.weight": tensors[f"{name}.weight"]})
            assert len(made) == 2
            numbers[name] = Fp8Dequantize(of)._dequantize_one(*made.values(), output_dtype=torch.float32)
            tensors |= made
        save(model, folder, tensors, {**config.to_dict(), "quant_method": "fp8"})
        return numbers

    return write


GROUP = {"strategy": "group", "group_size": 32}
FOLDERS: dict[str, Write] = {
    "pack-4": compressed("pack-quantized", num_bits=4, **GROUP),
    "pack-4-zeros": compressed("pack-quantized", num_bits=4, symmetric=False, **GROUP),
    "pack-8": compressed("pack-quantized", num_bits=8, strategy="channel"),
    "int": compressed("int-quantized", num_bits=8, strategy="channel"),
    "int-zeros": compressed("int-quantized", num_bits=8, strategy="channel", symmetric=False),
    "int-group": compressed("int-quantized", num_bits=8, **GROUP),
    "float": compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "float-tensor": compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "float-block": compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 32]),
    "nvfp4": compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    "mxfp4": compressed(
        "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8"
    ),
    "nf4": bitsandbytes("nf4"),
    "nf4-nested": bitsandbytes("nf4", nested=True),
    "fp4": bitsandbytes("fp4"),
    "llm-int8": bitsandbytes("int8"),
    "torchao-int8": torchao(lambda q: q.Int8WeightOnlyConfig()),
    "torchao-int8-group": torchao(lambda q: q.Int8WeightOnlyConfig(granularity=q.PerGroup(32))),
    "torchao-int4": torchao(lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32))),
    "torchao-int2": torchao(lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int2, granularity=q.PerGroup(32))),
    "torchao-int4-zeros": torchao(
        lambda q: q.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=q.PerGroup(32), mapping_type=q.MappingType.ASYMMETRIC
        )
    ),
    "torchao-float8": torchao(lambda q: q.Float8WeightOnlyConfig()),
    "fp8": fp8((32, 32)),
    "fp8-powers": fp8((32, 32), "ue8m0"),
}


@pytest.mark.parametrize("config", [LLAMA, QWEN2, BERT], ids=lambda config: config["model_type"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_a_library(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = drawn_model(config)
    plain = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    numbers = FOLDERS[name](model, tmp_path / "quantized")
    assert len(numbers) == (14 if config is not BERT else 12)
    store = open_quantized(open_checkpoint(ModelFolder.find(tmp_path / "quantized", None)))
    assert isinstance(store, QuantizedCheckpoint)
    for module, expected in numbers.items():
        got, wide = store.array(f"{module}.weight"), expected.float().numpy()
        if name == "llm-int8":  # the library multiplies by 1 / 127 last
            np.testing.assert_allclose(got, wide, rtol=2**-22, atol=0)
        else:
            np.testing.assert_array_equal(got, wide)
        plain[f"{module}.weight"] = expected.float()
    save(drawn_model(config), tmp_path / "plain", plain, None)
    expected_output = result(treadle.compile(tmp_path / "plain", backend="numpy"))
    for backend in ("numpy", "torch", "tvm"):
        pytest.importorskip(backend)
        made = treadle.compile(tmp_path / "quantized", backend=backend)
        np.testing.assert_allclose(result(made), expected_output, atol=1e-4, rtol=0)


def result(made: Any) -> Any:
    return np.asarray(next(iter(made(tokens=TOKENS).values())))


@pytest.mark.parametrize(
    ("kind", "symmetric"), [("int", True), ("int", False), ("float", True)], ids=["int", "zero", "float"]
)
def test_inputs_are_rounded_with_stored_scales_as_in_compressed_tensors(kind: str, symmetric: bool) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    asked = QuantizationArgs(num_bits=8, type=kind, strategy="tensor", dynamic=False, symmetric=symmetric)
    x = (np.random.default_rng(0).standard_normal((64, 512)) * 3).astype(np.float32)
    scale, zero = np.float32(0.031), 0 if symmetric else 7
    points = torch.tensor([zero], dtype=torch.int8) if kind == "int" else None
    expected = fake_quantize(torch.from_numpy(x), torch.tensor([scale]), points, asked).numpy()
    if kind == "int":
        made = FakeQuantize().reference(x, scale, np.float32(zero))
    else:
        made = RoundTo(format="f8e4m3fn", saturate=True).reference(x / scale) * scale
    np.testing.assert_array_equal(made, expected)
