"""Folders with quantized weights: every layout's numbers, models on each backend, and refusals of what is not read."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import treadle
from tests.fuzz.quantized_folders import run
from tests.quantized_folders import (
    BERT,
    BF16,
    E4M3,
    E8M0,
    GPT2,
    LLAMA,
    QWEN2,
    Encoder,
    Stored,
    awq,
    bitsandbytes,
    compressed,
    compressed_settings,
    experts,
    floats,
    gptq,
    gptq_settings,
    integers,
    llm_int8,
    save_tensors,
    small_floats,
    torchao,
    write_folder,
)
from treadle.backends.tvm import panel_memory
from treadle.explaining.quantization import explain_quantization
from treadle.files.converted_arrays import ConvertedArray
from treadle.frontends.quantized.quantized_weights import GroupedIntegers
from treadle.ir.errors import CheckpointError, GraphError, UsageError
from treadle.ir.interpreter import interpret
from treadle.program.source import ModelSource
from treadle.runtime.generation import generate

UP = "model.layers.1.mlp.up_proj"
TOKENS = np.array([[3, 14, 15, 92, 65, 35, 89, 79], [27, 18, 28, 18, 28, 45, 90, 45]])


def output(made: Any) -> np.ndarray[Any, Any]:
    return np.asarray(next(iter(made(tokens=TOKENS).values())))


def numbers_of(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the weights of a folder as the reader decodes them, without a backend."""
    weights = ModelSource.open(folder).resolve(widen="blocks").weights
    assert weights is not None
    return {name: np.asarray(array) for name, array in weights.items()}


# -- nothing loads silently wrong --------------------------------------------------------------------------------------


def plain(rng: np.random.Generator, n: int, k: int) -> tuple[Stored, np.ndarray[Any, Any]]:
    numbers = (rng.standard_normal((n, k)) * 0.1).astype(np.float32)
    return {".weight": numbers}, numbers


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    "part", [".weight_scale", ".weight_scale_inv", ".scales", ".weight.absmax", ".SCB", ".input_scale", ".qweight"]
)
def test_numbers_next_to_a_scale_are_refused(part: str, dtype: Any, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"

    def change(tensors: Stored) -> None:
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].astype(dtype)
        tensors[name + part] = np.full((1, 1), 0.5, np.float32)

    folder, _ = write_folder(tmp_path, plain, None, change=change)
    with pytest.raises(CheckpointError, match="is stored quantized, in a format that is not read") as error:
        treadle.compile(folder)
    assert name + part in str(error.value)


def test_a_declaration_does_not_bind_numbers_next_to_a_scale(tmp_path: Path) -> None:
    weights = {"w": np.ones((4, 4), np.float16), "w_scale": np.ones((4, 1), np.float32)}
    save_file(weights, tmp_path / "weights.safetensors")
    (tmp_path / "model.py").write_text(
        "import treadle.frontends.language as t\n"
        "@t.model\n"
        "def small(x: t.f32['B 4']):\n"
        "    return x @ t.parameter('w', 4, 4)\n"
    )
    with pytest.raises(CheckpointError, match="w is stored quantized"):
        treadle.compile(f"{tmp_path}/model.py:small", weights=tmp_path)


@pytest.mark.parametrize("method", ["aqlm", "hqq", "quark", "vptq", "eetq", "quanto", "higgs", "spqr", "modelopt"])
def test_a_method_that_is_not_read_is_refused_by_name(method: str, tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path, plain, {"quant_method": method})
    with pytest.raises(CheckpointError, match=f"quantized by {method} are not supported") as error:
        treadle.compile(folder)
    assert "gptq" in str(error.value.hint)


@pytest.mark.parametrize("settings", [{}, {"quant_method": 4}, "gptq", {"bits": 4}])
def test_settings_without_a_method_are_refused(settings: Any, tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path, plain, settings)
    with pytest.raises(CheckpointError):
        treadle.compile(folder)


def test_settings_of_plain_numbers_are_refused(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path, plain, gptq_settings())
    with pytest.raises(CheckpointError, match="but no tensor is"):
        treadle.compile(folder)


def test_settings_in_a_file_of_their_own_are_read(tmp_path: Path) -> None:
    folder, wide = write_folder(tmp_path, gptq(), None)
    with pytest.raises(CheckpointError, match="is stored quantized"):
        treadle.compile(folder)
    settings = gptq_settings()
    del settings["quant_method"]
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    got, expected = numbers_of(folder), numbers_of(wide)
    for name, numbers in expected.items():
        np.testing.assert_array_equal(got[name], numbers)


def test_settings_of_a_part_of_a_model_are_refused(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path, gptq(), None, {**LLAMA, "text_config": {"quantization_config": gptq_settings()}})
    with pytest.raises(CheckpointError, match="text_config has quantization settings of its own"):
        treadle.compile(folder)


# -- layouts -----------------------------------------------------------------------------------------------------------

GPTQ: list[tuple[str, Encoder, dict[str, Any], str]] = [
    *[(f"gptq-{b}", gptq(b, 32), gptq_settings(b, 32), "int4_groups(32)") for b in (2, 3, 4)],
    ("gptq-8", gptq(8, 32), gptq_settings(8, 32), "int8_groups(32)"),
    *[(f"gptq-{b}-zeros", gptq(b, 32, symmetric=False), gptq_settings(b, 32), "uint4_groups(32)") for b in (2, 3, 4)],
    ("gptq-8-zeros", gptq(8, 32, symmetric=False), gptq_settings(8, 32), "int8_zero_groups(32)"),
    ("gptq-rows", gptq(4, -1), gptq_settings(4, -1), "int4_groups"),
    ("gptq-8-rows", gptq(8, -1), gptq_settings(8, -1), "int8_rows"),
    ("gptq-64", gptq(4, 64, index=False), gptq_settings(4, 64), "int4_groups(64)"),
    (
        "gptq-v2",
        gptq(4, 32, symmetric=False, version=2),
        gptq_settings(4, 32, checkpoint_format="gptq_v2"),
        "uint4_groups(32)",
    ),
    *[
        (f"gptq-order-{each}", gptq(4, 32, order=each, symmetric=False), gptq_settings(4, 32, desc_act=True), form)
        for each, form in (("shared", "uint4_groups(32)"), ("own", "uint4_groups(32)"), ("unequal", ""))
    ],
    ("gptq-8-order", gptq(8, 32, order="shared"), gptq_settings(8, 32, desc_act=True), "int8_groups(32)"),
]
AWQ_SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
AWQ: list[tuple[str, Encoder, dict[str, Any], str]] = [
    ("awq", awq(), {**AWQ_SETTINGS, "modules_to_not_convert": None}, "uint4_groups(32)"),
    ("awq-64", awq(64), {**AWQ_SETTINGS, "group_size": 64}, "uint4_groups(64)"),
    ("awq-gemv", awq(16, "gemv"), {**AWQ_SETTINGS, "group_size": 16, "version": "GEMV"}, "uint4_groups(16)"),
]
PACK, INTS, FLOATS = (f"{kind}-quantized" for kind in ("pack", "int", "float"))
GROUPS = {"strategy": "group", "group_size": 32}
COMPRESSED: list[tuple[str, Encoder, dict[str, Any], str]] = [
    ("pack-4", compressed(), compressed_settings(PACK, num_bits=4, **GROUPS), "int4_groups(32)"),
    (
        "pack-4-zeros",
        compressed(symmetric=False, dtype=BF16),
        compressed_settings(PACK, num_bits=4, symmetric=False, **GROUPS),
        "uint4_groups(32)",
    ),
    (
        "pack-4-float32",
        compressed(dtype=np.float32),
        compressed_settings(PACK, num_bits=4, **GROUPS),
        "uint4_wide_groups(32)",
    ),
    ("pack-4-rows", compressed(group=None), compressed_settings(PACK, num_bits=4), "int4_groups"),
    (
        "pack-4-order",
        compressed(order=True),
        compressed_settings(PACK, num_bits=4, actorder="group", **GROUPS),
        "int4_groups(32)",
    ),
    ("pack-8", compressed(8, dtype=np.float32), compressed_settings(PACK, **GROUPS), "int8_groups(32)"),
    (
        "pack-8-zeros",
        compressed(8, symmetric=False),
        compressed_settings(PACK, symmetric=False, **GROUPS),
        "int8_zero_groups(32)",
    ),
    ("int", integers(), compressed_settings(INTS), "int8_rows"),
    ("int-tensor", integers("tensor"), compressed_settings(INTS, strategy="tensor"), "int8_rows"),
    ("int-group", integers("group"), compressed_settings(INTS, **GROUPS), "int8_groups(32)"),
    ("int-zeros", integers(symmetric=False), compressed_settings(INTS, symmetric=False), "int8_zero_groups"),
    (
        "int-block",
        integers("block"),
        compressed_settings(INTS, strategy="block", block_structure=[48, 48]),
        "",
    ),
    *[
        (f"float-{s}", floats(s), compressed_settings(FLOATS, type="float", strategy=s, **more), "e4m3_groups")
        for s, more in (("channel", {}), ("tensor", {}), ("group", {"group_size": 32}))
    ],
]
COMPRESSED += [
    (
        f"{kind}fp4",
        small_floats(group),
        compressed_settings(f"{kind}fp4-pack-quantized", num_bits=4, type="float", strategy=by, group_size=group),
        f"e2m1_groups({group})",
    )
    for kind, group, by in (("nv", 16, "tensor_group"), ("mx", 32, "group"))
]
FP8 = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}
FP8_ROWS: list[tuple[str, Encoder, dict[str, Any], str]] = [
    *[
        (
            f"fp8-{dtype.name}",
            floats("block", ".weight_scale_inv", dtype, (48, 32)),
            {**FP8, "weight_block_size": [48, 32], "fmt": "e4m3"},
            "e4m3_groups(32)",
        )
        for dtype in (np.dtype(np.float32), BF16, E8M0)
    ],
    ("fp8-tensor", floats("tensor"), FP8, "e4m3_groups"),
    ("fp8-partial", floats("block", ".weight_scale_inv"), {**FP8, "weight_block_size": [48, 48]}, ""),
]
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BNB_ROWS: list[tuple[str, Encoder, dict[str, Any], str]] = [
    ("nf4", bitsandbytes(), BNB, "nf4_groups(64)"),
    ("nf4-nested", bitsandbytes(nested=True), {**BNB, "bnb_4bit_use_double_quant": True}, "nf4_groups(64)"),
    ("fp4", bitsandbytes("fp4"), BNB, "fp4_groups(64)"),
    ("nf4-over-rows", bitsandbytes(block=256), BNB, ""),
]
BNB_8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0}
TORCHAO = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}
INTX = "IntxUnpackedToInt8Tensor"
TORCHAO_ROWS: list[tuple[str, Encoder, dict[str, Any], str]] = [
    ("torchao-int8", torchao(), TORCHAO, "int8_rows"),
    ("torchao-int8-group", torchao(group=32), TORCHAO, "int8_groups(32)"),
    ("torchao-int8-zeros", torchao(symmetric=False), TORCHAO, "int8_zero_groups"),
    *[(f"torchao-int{b}", torchao(INTX, 32, bits=b), TORCHAO, "uint4_wide_groups(32)") for b in (1, 2, 3, 4)],
    ("torchao-int4-zeros", torchao(INTX, bits=4, symmetric=False), TORCHAO, "uint4_wide_groups"),
    ("torchao-int6", torchao(INTX, 32, bits=6), TORCHAO, "int8_groups(32)"),
    ("torchao-float8", torchao("Float8Tensor"), TORCHAO, "e4m3_groups"),
]
TOKEN = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token", "symmetric": True, "group_size": None}
ROUNDED = compressed_settings(INTS)
ROUNDED["config_groups"]["group_0"]["input_activations"] = TOKEN
STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}
WITH_SCALES = compressed_settings(INTS)
WITH_SCALES["config_groups"]["group_0"]["input_activations"] = {**STATIC, "symmetric": False}
LAYOUTS = [
    *GPTQ,
    *AWQ,
    *COMPRESSED,
    *FP8_ROWS,
    *BNB_ROWS,
    ("llm-int8", llm_int8(), BNB_8, "int8_rows"),
    ("int-rounded", integers(), ROUNDED, "int8_rows"),
    ("int-static", integers(static=True), WITH_SCALES, "int8_rows"),
    *TORCHAO_ROWS,
]


@pytest.mark.parametrize(("encode", "settings", "form"), [row[1:] for row in LAYOUTS], ids=[row[0] for row in LAYOUTS])
def test_a_layout_decodes_to_its_numbers(encode: Encoder, settings: Any, form: str, tmp_path: Path) -> None:
    """Weights that stay in blocks, decoded, and weights that are decoded when they are read, are the encoder's numbers
    bitwise.
    """
    folder, wide = write_folder(tmp_path, encode, settings)
    expected = numbers_of(wide)
    got = numbers_of(folder)
    resolved = ModelSource.open(folder).resolve()
    assert resolved.weights is not None
    assert (resolved.unused, resolved.unread) == ((), ())
    encoded = 0
    for name, numbers in expected.items():
        np.testing.assert_array_equal(got[name], numbers)
        encoding = resolved.graph.parameters[name].type.encoding
        if encoding is not None:
            assert str(encoding).startswith(form)
            held = encoding.decode(np.asarray(resolved.weights[name]))
            arrays = {each: np.asarray(array) for each, array in resolved.weights.items() if "order" in each}
            orders = [each for each in arrays.values() if len(each) == numbers.shape[1]] or [np.arange(len(numbers.T))]
            assert any(np.array_equal(held, numbers[:, order]) for order in orders)
            encoded += 1
    assert encoded == (14 if form else 0)


# -- blocks are converted when they are read ---------------------------------------------------------------------------


def converted(folder: Path) -> dict[str, ConvertedArray]:
    weights = ModelSource.open(folder).resolve().weights or {}
    return {name: array for name, array in weights.items() if isinstance(array, ConvertedArray)}


@pytest.mark.parametrize(("encode", "settings", "form"), [row[1:] for row in LAYOUTS], ids=[row[0] for row in LAYOUTS])
def test_rows_are_converted_as_the_whole_weight(encode: Encoder, settings: Any, form: str, tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path, encode, settings)
    found = converted(folder)
    assert len(found) == (14 if form else 0)
    for array in [*found.values()][:3]:
        whole, read = array.read(), array.open()
        assert whole.shape == array.shape
        ends = [0, 1, 3, 13, 29, len(whole)]  # ranges that are not multiples of packed words
        rows = [read(slice(first, last)) for first, last in itertools.pairwise(ends)]
        np.testing.assert_array_equal(np.concatenate(rows), whole)
        np.testing.assert_array_equal(array.array, whole)


def test_equal_tensors_with_other_settings_have_another_identity(tmp_path: Path) -> None:
    """Zeros are one more in the first format of GPTQ, so that panels of one model are not those of the other."""
    pytest.importorskip("tvm")
    encode, settings = gptq(symmetric=False), gptq_settings()
    made = []
    for version in ("gptq", "gptq_v2"):
        folder, _ = write_folder(tmp_path / version, encode, {**settings, "checkpoint_format": version})
        made.append(converted(folder))
    for name, first in made[0].items():
        second = made[1][name]
        for one, other in zip(first.parts, second.parts, strict=True):
            np.testing.assert_array_equal(one, other)
        assert first.recipe != second.recipe
        assert (first.read() != second.read()).any()


def test_a_weight_depends_on_all_tensors_that_it_reads(tmp_path: Path) -> None:
    """Each part of a weight is one of its hashed arrays: changing a byte of any tensor of a module changes one."""
    for name, encode, settings, form in LAYOUTS:
        if not form:
            continue
        kept: Stored = {}
        folder, _ = write_folder(tmp_path / name, encode, settings, change=kept.update)
        weight = next(weight for weight in converted(folder) if weight.endswith("mlp.up.weight"))
        array = converted(folder)[weight]
        modules = [name for name in kept if name.startswith("model.layers.0.mlp.up_proj.")]
        sizes = sorted(kept[name].nbytes for name in modules if not isinstance(kept[name], str))
        assert sorted(part.nbytes for part in array.parts) == sizes, name


def test_panels_in_the_cache_are_read_without_converting_a_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tvm")
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(panel_memory, "SMALLEST", 0)
    encode, settings = next((encode, settings) for name, encode, settings, _ in LAYOUTS if name == "awq")
    folder, _ = write_folder(tmp_path, encode, settings)
    expected = output(treadle.compile(folder, backend="tvm"))
    panel_memory.finish_writing()
    monkeypatch.setattr(panel_memory, "_held", WeakValueDictionary())
    opened = []
    original = GroupedIntegers.reader
    monkeypatch.setattr(GroupedIntegers, "reader", lambda weight: opened.append(weight) or original(weight))
    made = treadle.compile(folder, backend="tvm")
    np.testing.assert_array_equal(output(made), expected)
    assert opened == []
    weight = made.weights["layer.0.mlp.up.weight"]
    assert len(opened) == 1 and isinstance(weight, np.ndarray) and not weight.flags.writeable
    assert made.weights["layer.0.mlp.up.weight"] is weight


@pytest.mark.parametrize("config", [LLAMA, BERT], ids=lambda config: config["model_type"])
@pytest.mark.parametrize(
    "layout",
    ["gptq-8-zeros", "gptq-order-own", "awq", "pack-4", "int", "fp8-bfloat16", "nf4", "llm-int8", "torchao-int4"],
)
def test_a_model_of_each_method_computes_as_with_its_numbers(layout: str, config: Any, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    encode, settings = next((encode, settings) for name, encode, settings, _ in LAYOUTS if name == layout)
    folder, wide = write_folder(tmp_path, encode, settings, config)
    expected = output(treadle.compile(wide, backend="numpy"))
    np.testing.assert_allclose(output(treadle.compile(folder, backend="tvm")), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", [LLAMA, QWEN2, BERT, GPT2], ids=lambda config: config["model_type"])
@pytest.mark.parametrize("backend", ["numpy", "torch", "tvm"])
def test_a_quantized_model_computes_as_with_its_numbers(config: Any, backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    folder, wide = write_folder(tmp_path, gptq(4, 32, symmetric=False), gptq_settings(), config)
    expected = output(treadle.compile(wide, backend="numpy"))
    np.testing.assert_allclose(output(treadle.compile(folder, backend=backend)), expected, atol=1e-4, rtol=0)


def ordered_folder(order: str, tmp_path: Path, config: Any = LLAMA) -> tuple[Path, Path]:
    encode = gptq(4, 32, order=order, symmetric=False)
    return write_folder(tmp_path, encode, gptq_settings(desc_act=True), config)


@pytest.mark.parametrize("backend", ["numpy", "torch", "tvm"])
@pytest.mark.parametrize(("order", "gathers"), [("shared", 4), ("own", 7), ("unequal", 0)])
def test_products_with_one_order_of_inputs_share_a_gather(
    order: str, gathers: int, backend: str, tmp_path: Path
) -> None:
    """Query, key and value read one gather, and so do gate and up; they are merged as without an order."""
    pytest.importorskip(backend)
    folder, wide = ordered_folder(order, tmp_path)
    made = treadle.compile(folder, backend=backend)
    ops = [node.op.name for _, node in made.graph.walk()]
    assert ops.count("gather") == gathers
    assert ("projections" in ops) == (order != "own")
    expected = output(treadle.compile(wide, backend="numpy"))
    np.testing.assert_allclose(output(made), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"quantize": "int8"}], ids=str)
def test_an_order_of_inputs_does_not_change_the_products(options: Any, tmp_path: Path) -> None:
    """The same numbers, stored group by group, compute almost the same as decoded numbers in their own order."""
    pytest.importorskip("tvm")
    folder, wide = ordered_folder("shared", tmp_path)
    expected, got = (
        output(treadle.compile(each, backend="tvm", **more)) for each, more in ((wide, {}), (folder, options))
    )
    assert (got * expected).sum() / np.sqrt((got * got).sum() * (expected * expected).sum()) > 0.999


def test_a_model_with_an_order_of_inputs_continues_a_text(tmp_path: Path) -> None:
    """The step of a session reads the same orders."""
    folder, wide = ordered_folder("shared", tmp_path)
    sessions = [treadle.compile(each, backend="numpy").session(capacity=16) for each in (folder, wide)]
    made, expected = ([token.id for token in generate(each, [[3, 14, 15]], most=6)] for each in sessions)
    assert made == expected


def test_matrices_of_experts_are_read(tmp_path: Path) -> None:
    """A declaration reads the experts of a gpt-oss folder; the family itself is refused by name."""
    rng = np.random.default_rng(2)
    parts, numbers = experts(rng, 3, 8, 64)
    save_tensors(
        {f"experts.gate_up_proj{part}": array for part, array in parts.items()}, tmp_path / "model.safetensors"
    )
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.0.self_attn"]}
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="gpt_oss"):
        treadle.compile(tmp_path)
    (tmp_path / "model.py").write_text(
        "import treadle.frontends.language as t\n"
        "@t.model\n"
        "def small(x: t.f32['B 64']):\n"
        "    return t.einsum(x, t.parameter('experts.gate_up_proj', 3, 8, 64), equation='b k, e n k -> b e n')\n"
    )
    source = ModelSource.open(f"{tmp_path}/model.py:small", weights=tmp_path)
    resolved = source.resolve()
    assert resolved.weights is not None
    encoding = resolved.graph.parameters["experts.gate_up_proj"].type.encoding
    assert str(encoding) == "mxfp4"
    x = rng.standard_normal((2, 64)).astype(np.float32)
    for backend in ("numpy", "torch", "tvm"):
        pytest.importorskip(backend)
        made = treadle.compile(source, backend=backend)
        got = np.asarray(next(iter(made(x=x).values())))
        np.testing.assert_allclose(got, np.einsum("bk,enk->ben", x, numbers), atol=1e-5, rtol=1e-5)


# -- bad input ---------------------------------------------------------------------------------------------------------


def put(part: str, index: Any, value: Any) -> Any:
    def change(tensors: Stored) -> None:
        tensors[UP + part] = tensors[UP + part].copy()
        tensors[UP + part][index] = value

    return change


def reshape(part: str, to: Any) -> Any:
    def change(tensors: Stored) -> None:
        tensors[UP + part] = np.ascontiguousarray(to(tensors[UP + part]))

    return change


def drop(part: str) -> Any:
    return lambda tensors: tensors.pop(UP + part)


GPTQ_DAMAGE: list[tuple[str, Any, dict[str, Any], str]] = [
    ("scale-nan", put(".scales", (1, 5), np.nan), {}, r"a scale is NaN, infinite or zero"),
    ("scale-infinite", put(".scales", (1, 5), np.inf), {}, r"a scale is NaN, infinite or zero"),
    ("scale-zero", put(".scales", (0, 0), 0), {}, r"a scale is NaN, infinite or zero"),
    ("no-scales", drop(".scales"), {}, "lacks model.layers.1.mlp.up_proj.scales"),
    ("no-zeros", drop(".qzeros"), {}, "lacks model.layers.1.mlp.up_proj.qzeros"),
    ("no-words", drop(".qweight"), {}, "is stored quantized, in a format that is not read"),
    ("group-out-of-range", put(".g_idx", 7, 2), {}, "a group is out of range: there are 2"),
    ("group-negative", put(".g_idx", 7, -1), {}, "a group is out of range"),
    ("groups-short", reshape(".g_idx", lambda x: x[:-1]), {}, "a part of a quantized weight does not fit"),
    ("words-rank", reshape(".qweight", lambda x: x[None]), {}, "a part of a quantized weight does not fit"),
    ("words-dtype", reshape(".qweight", lambda x: x.astype(np.int64)), {}, "a part of a quantized weight does not fit"),
    ("words-empty", reshape(".qweight", lambda x: x[:0]), {}, "a part of a quantized weight does not fit"),
    ("scales-turned", reshape(".scales", lambda x: x.T), {}, "a part of a quantized weight does not fit"),
    ("scales-integers", reshape(".scales", lambda x: x.astype(np.int32)), {}, "a part of a quantized weight does not"),
    ("zeros-short", reshape(".qzeros", lambda x: x[:, :-1]), {}, "a part of a quantized weight does not fit"),
    ("stored-maximum", put(".qzeros", (0, 0), -1), {}, "a stored zero is the largest integer"),
    ("bits", None, {"bits": 8}, "a part of a quantized weight does not fit|do not divide"),
    ("bits-3", None, {"bits": 3}, "are not an integer number of integers of 3 bits"),
    ("bits-unknown", None, {"bits": 5}, "unsupported value of bits"),
    ("bits-text", None, {"bits": "4"}, "unsupported value of bits"),
    ("group", None, {"group_size": 48}, "groups of 48 do not divide the"),
    ("group-zero", None, {"group_size": 0}, "unsupported value of group_size"),
    ("group-other", None, {"group_size": 64}, "a part of a quantized weight does not fit"),
    ("form", None, {"checkpoint_format": "marlin"}, "unsupported value of checkpoint_format"),
    ("pack", None, {"pack_dtype": "int16"}, "unsupported value of pack_dtype"),
    ("adapter", None, {"adapter": {"name": "lora"}}, "unsupported value of adapter"),
    ("dynamic-list", None, {"dynamic": [1]}, "unsupported value of dynamic"),
    ("dynamic-excludes", None, {"dynamic": {r"-:.*mlp.up": {}}}, "exclude model.layers.0.mlp.up_proj, which has"),
    ("dynamic-slow", None, {"dynamic": {r"(a+)+$": {}}}, "a pattern of module names cannot be read"),
    ("dynamic-slower", None, {"dynamic": {".*" * 9: {}}}, "a pattern of module names cannot be read"),
    ("dynamic-invalid", None, {"dynamic": {"[": {}}}, "a pattern of module names cannot be read"),
]


@pytest.mark.parametrize(("change", "more", "match"), [d[1:] for d in GPTQ_DAMAGE], ids=[d[0] for d in GPTQ_DAMAGE])
def test_a_damaged_gptq_folder_is_refused(change: Any, more: dict[str, Any], match: str, tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path, gptq(), {**gptq_settings(), **more}, change=change or (lambda tensors: None))
    with pytest.raises(CheckpointError, match=match):
        ModelSource.open(folder).resolve()


def test_settings_of_single_modules_are_read(tmp_path: Path) -> None:
    """The first pattern that matches the start of a module's name counts; up_proj has groups of 64 and 8 bits."""

    def encode(rng: np.random.Generator, n: int, k: int) -> tuple[Stored, np.ndarray[Any, Any]]:
        return (gptq(8, 64) if n == 128 else gptq(4, 32))(rng, n, k)

    dynamic = {r"+:.*\.mlp\.(gate|up)_proj": {"bits": 8, "group_size": 64}, r".*mlp": {"bits": 4}, "-:lm_head": {}}
    folder, wide = write_folder(tmp_path, encode, gptq_settings(dynamic=dynamic))
    got = numbers_of(folder)
    for name, numbers in numbers_of(wide).items():
        np.testing.assert_array_equal(got[name], numbers)


def test_an_unknown_setting_is_reported(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path, gptq(), gptq_settings(curvature=3))
    assert ModelSource.open(folder).resolve().unread == ("quantization_config.curvature",)


def test_trained_weights_are_not_saved_in_a_quantized_layout(tmp_path: Path) -> None:
    from treadle.training.saving import saver_for

    folder, _ = write_folder(tmp_path, gptq(), gptq_settings())
    source = ModelSource.open(folder).resolve(widen="blocks")
    with pytest.raises(UsageError, match="cannot be saved in the layout of a folder whose weights are quantized"):
        saver_for(source, tmp_path / "saved")


def test_a_weight_that_is_decoded_when_it_is_read_is_in_the_log(tmp_path: Path) -> None:
    folder, _ = ordered_folder("unequal", tmp_path)
    log = treadle.compile(folder, backend="numpy").log
    notes = [note for record in log if record.name == "read-weights" for note in record.notes]
    assert len(notes) == 14
    assert notes[0] == ("layer.0.attn.q.weight is decoded when it is read: its groups do not all have 32 inputs")


def asking(layout: str, tmp_path: Path, **activations: Any) -> tuple[Path, Path]:
    """Write a folder of a layout of compressed-tensors whose settings ask for a rounding of inputs."""
    encode, settings = next((encode, settings) for name, encode, settings, _ in LAYOUTS if name == layout)
    settings = json.loads(json.dumps(settings))
    if "config_groups" in settings:
        settings["config_groups"]["group_0"]["input_activations"] = activations
    else:
        settings |= activations
    return write_folder(tmp_path, encode, settings)


def test_rounding_of_inputs_that_is_not_applied_is_reported(tmp_path: Path) -> None:
    folder, wide = asking("int", tmp_path, **TOKEN)
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8}
    (folder / "config.json").write_text(json.dumps(settings))
    made = treadle.compile(folder, backend="numpy")
    assert made.unread == ("quantization_config.kv_cache_scheme",)
    notes = [note for record in made.log if record.name == "read-weights" for note in record.notes]
    what = "inputs of 14 weights are not rounded as the file asks (int8, dynamic per token)"
    assert notes == [f"{what}; quantize as-stored rounds them"]
    np.testing.assert_allclose(output(made), output(treadle.compile(wide, backend="numpy")), atol=1e-5)


def rounded_rows(x: Any, kind: str) -> Any:
    """Round as the settings ask: integers from -127 to 127, integers from 0 to 255, or e4m3, with a scale per row."""
    if kind == "int8":
        scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
        return np.rint(x / scale) * scale
    if kind == "uint8":
        least, most = np.minimum(x.min(axis=-1, keepdims=True), 0), np.maximum(x.max(axis=-1, keepdims=True), 0)
        scale = (most - least) / 255
        zero = np.rint(-least / scale)
        return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
    groups = x.reshape(*x.shape[:-1], -1, 32) if kind == "e4m3 by 32" else x
    scale = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(448)
    return ((groups / scale).astype(E4M3).astype(np.float32) * scale).reshape(x.shape)


ROUNDINGS: list[tuple[str, str, dict[str, Any], str]] = [
    ("int", "int8", TOKEN, "int8, dynamic per token"),
    ("pack-4", "int8", TOKEN, "int8, dynamic per token"),
    ("pack-4-zeros", "uint8", {**TOKEN, "symmetric": False}, "int8, dynamic per token, with a zero point"),
    ("float-channel", "e4m3", {**TOKEN, "type": "float"}, "f8e4m3fn, dynamic per token"),
    ("fp8-tensor", "e4m3", {"activation_scheme": "dynamic"}, "f8e4m3fn, dynamic per token"),
    (
        "float-group",
        "e4m3 by 32",
        {**TOKEN, "type": "float", "strategy": "group", "group_size": 32},
        "f8e4m3fn, dynamic in groups of 32",
    ),
]


@pytest.mark.parametrize(("layout", "kind", "asked", "text"), ROUNDINGS, ids=[f"{r[0]}-{r[1]}" for r in ROUNDINGS])
def test_inputs_are_rounded_as_the_file_asks(
    layout: str, kind: str, asked: dict[str, Any], text: str, tmp_path: Path
) -> None:
    """The first products compute with rounded inputs, and every backend computes almost the same."""
    pytest.importorskip("tvm")
    folder, wide = asking(layout, tmp_path, **asked)
    plan = explain_quantization(folder, quantize="as-stored")
    assert len(plan.stored) == 14
    assert {str(rounding)[: len(text)] for rounding in plan.stored.values()} == {text}
    assert text in str(plan)
    weights = numbers_of(wide)
    x = weights["embed.weight"][TOKENS]
    norm = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * weights["layer.0.attn_norm.weight"]
    source = ModelSource.open(folder).resolve(as_stored=True)
    assert source.weights is not None
    seen: dict[str, Any] = {}

    def watch(node: Any, results: Any) -> None:
        if node.results[0].name.endswith("attn_norm_rounded") and "x" not in seen and node.op.name != "encode":
            seen["x"] = results[0]

    held = {name: np.asarray(array) for name, array in source.weights.items()}
    interpret(source.graph, {"tokens": TOKENS}, held, watch=lambda node, results, *_: watch(node, results))
    np.testing.assert_allclose(seen["x"], rounded_rows(norm, kind), atol=0.02)
    assert np.mean(np.abs(seen["x"] - rounded_rows(norm, kind)) > 1e-5) < 0.02  # ties of numbers that differ by an ulp
    outputs = [output(treadle.compile(folder, backend=b, quantize="as-stored")) for b in ("numpy", "torch", "tvm")]
    plain_output = output(treadle.compile(folder, backend="numpy"))
    for each in outputs:
        cosine = (each * plain_output).sum() / np.sqrt((each * each).sum() * (plain_output * plain_output).sum())
        assert 0.99 < cosine < 1 - 1e-9
        np.testing.assert_allclose(each, outputs[0], atol=0.1)


STATICS: list[tuple[str, dict[str, Any], str]] = [
    ("int", STATIC, "int8, static per tensor"),
    ("int", {**STATIC, "symmetric": False}, "int8, static per tensor, with a zero point"),
    ("pack-4", STATIC, "int8, static per tensor"),
    ("float-channel", {**STATIC, "type": "float"}, "f8e4m3fn, static per tensor"),
    ("fp8-tensor", {"activation_scheme": "static"}, "f8e4m3fn, static per tensor"),
]
MODULES = {
    "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
    "attn.out": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
TOGETHER = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Modules that read the same value as another module."""


def static_folder(
    layout: str, asked: dict[str, Any], tmp_path: Path, *, shared: bool
) -> tuple[Path, dict[str, tuple[Any, Any]]]:
    """Write a folder with a scale of inputs for each module, and a zero if there is one. Return both by module.

    shared  modules that read one value have the same scale
    """
    encode, settings = next((e, s) for name, e, s, _ in LAYOUTS if name == layout)
    settings = json.loads(json.dumps(settings))
    if "config_groups" in settings:
        settings["config_groups"]["group_0"]["input_activations"] = asked
    else:
        settings |= asked
    rng, steps = np.random.default_rng(5), dict[str, tuple[Any, Any]]()
    largest = 127 if asked.get("type") == "int" else 448

    def add(tensors: Stored) -> None:
        for module in [f"model.layers.{layer}.{name}" for layer in range(2) for name in MODULES.values()]:
            path, _, name = module.rpartition(".")
            other = f"{path}.{TOGETHER.get(name, name)}" if shared else module
            drawn = np.float32((2 + rng.random()) / largest), np.float32(rng.integers(-9, 9))
            scale, zero = steps[module] = steps.get(other, drawn if asked.get("symmetric") is False else (drawn[0], 0))
            tensors[f"{module}.input_scale"] = np.array([scale], np.float32)
            if "symmetric" in asked:
                tensors[f"{module}.input_zero_point"] = np.array([zero], np.int8)

    folder, _ = write_folder(tmp_path, encode, settings, change=add)
    return folder, steps


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize(
    ("layout", "asked", "text"), STATICS, ids=["int", "int-zero", "pack-4", "float-channel", "fp8-tensor"]
)
def test_inputs_are_rounded_with_the_scales_of_the_file(
    layout: str, asked: dict[str, Any], text: str, shared: bool, tmp_path: Path
) -> None:
    """Each product of both layers reads its input in the steps of its own module."""
    folder, steps = static_folder(layout, asked, tmp_path, shared=shared)
    plan = explain_quantization(folder, quantize="as-stored")
    assert {str(rounding) for rounding in plan.stored.values()} == {text}
    source = ModelSource.open(folder).resolve(as_stored=True)
    assert source.weights is not None
    products = [node for _, node in source.graph.walk() if node.op.name == "linear" and node.scope in MODULES]
    assert len({product.operands[0] for product in products}) == (4 if shared else 7)
    values: dict[Any, Any] = {}
    checked = Counter[str]()

    def watch(node: Any, results: Any, *_: Any) -> None:
        values.update(zip(node.results, results, strict=True))
        if node in products:
            module = f"model.layers.{checked[node.scope]}.{MODULES[node.scope]}"
            checked[node.scope] += 1
            scale, zero = steps[module]
            last = node.operands[0].node
            if text.startswith("int8"):
                x = values[last.operands[0]] / scale
                expected = (np.clip(np.rint(x) + zero, -128, 127) - zero) * scale
            else:
                x = values[last.operands[0].node.operands[0].node.operands[0]] / scale
                expected = np.clip(x, -448, 448).astype(E4M3).astype(np.float32) * scale
            np.testing.assert_array_equal(values[node.operands[0]], expected)

    held = {name: np.asarray(array) for name, array in source.weights.items()}
    (expected,) = interpret(source.graph, {"tokens": TOKENS}, held, watch=watch).values()
    assert checked == dict.fromkeys(MODULES, 2)
    for backend in ("numpy", "torch", "tvm"):
        pytest.importorskip(backend)
        made = output(treadle.compile(folder, backend=backend, quantize="as-stored"))
        np.testing.assert_allclose(made, expected, atol=0.02 * np.abs(expected).max())  # an ulp may be a step


def test_products_of_inputs_with_scales_of_the_file_are_integer_products(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    folder, _ = static_folder("int", STATIC, tmp_path, shared=True)
    made = treadle.compile(folder, backend="tvm", quantize="as-stored")
    assert any(record.name == "multiply-blocks" and record.changed for record in made.optimized.lowered.log)


STATIC_DAMAGE: list[tuple[str, dict[str, Any], Any, str]] = [
    ("missing", STATIC, lambda tensors: tensors.pop(f"{UP}.input_scale"), "a quantized weight lacks"),
    ("nan", STATIC, lambda tensors: tensors.update({f"{UP}.input_scale": np.array([np.nan], np.float32)}), "is NaN"),
    ("two", STATIC, lambda tensors: tensors.update({f"{UP}.input_scale": np.ones(2, np.float32)}), "have one scale"),
    ("zero", STATIC, lambda tensors: tensors.update({f"{UP}.input_zero_point": np.ones(1, np.int8)}), "zero of inputs"),
    (
        "fraction",
        {**STATIC, "symmetric": False},
        lambda tensors: tensors.update({f"{UP}.input_zero_point": np.full(1, 0.5, np.float32)}),
        "unsupported zero of inputs",
    ),
]


@pytest.mark.parametrize(
    ("asked", "change", "match"), [d[1:] for d in STATIC_DAMAGE], ids=[d[0] for d in STATIC_DAMAGE]
)
def test_damaged_scales_of_inputs_are_refused(asked: dict[str, Any], change: Any, match: str, tmp_path: Path) -> None:
    folder, _ = static_folder("int", asked, tmp_path, shared=True)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_tensors(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=match):
        ModelSource.open(folder).resolve(as_stored=True)
    ModelSource.open(folder).resolve()  # rounds nothing


def test_layers_that_ask_for_different_roundings_are_refused(tmp_path: Path) -> None:
    """Layers share one function, which cannot round the inputs of only some of its calls."""
    folder, _ = asking("int", tmp_path, **TOKEN)
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = {"targets": ["re:.*layers.1.*"], "weights": groups["group_0"]["weights"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(GraphError, match="calls of one function round inputs differently"):
        treadle.compile(folder, quantize="as-stored")


def test_products_of_rounded_inputs_are_integer_products(tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    folder, _ = asking("int", tmp_path, **TOKEN)
    made = treadle.compile(folder, backend="tvm", quantize="as-stored")
    assert any(record.name == "multiply-blocks" and record.changed for record in made.optimized.lowered.log)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("int", {**TOKEN, "dynamic": False}, "scales of tokens or groups in the file are not supported"),
    ("int", {**TOKEN, "strategy": "tensor"}, "a scale for all tokens"),
    ("int", {**TOKEN, "num_bits": 4}, "numbers int4 are not supported"),
    ("int", {**TOKEN, "strategy": "group", "group_size": 64}, "integers in groups of 64"),
    ("llm-int8", {}, "a threshold of inputs is not supported"),
]


@pytest.mark.parametrize(("layout", "asked", "why"), REFUSED, ids=[row[2] for row in REFUSED])
def test_a_rounding_that_is_not_supported_is_refused(
    layout: str, asked: dict[str, Any], why: str, tmp_path: Path
) -> None:
    folder, _ = asking(layout, tmp_path, **asked)
    assert f"no: {why}" in str(explain_quantization(folder))
    with pytest.raises(UsageError, match="cannot be rounded as the file asks") as error:
        treadle.compile(folder, quantize="as-stored")
    assert why in str(error.value)


def test_a_folder_that_asks_for_no_rounding_is_refused(tmp_path: Path) -> None:
    folder, _ = write_folder(tmp_path, gptq(), gptq_settings())
    with pytest.raises(UsageError, match="ask for no rounding of inputs"):
        treadle.compile(folder, quantize="as-stored")


def compressed_damage() -> list[tuple[str, Any, Any, str]]:
    def settings(**more: Any) -> dict[str, Any]:
        return {**compressed_settings(PACK, num_bits=4, **GROUPS), **more}

    def weights(**more: Any) -> dict[str, Any]:
        return compressed_settings(PACK, **{"num_bits": 4, **GROUPS, **more})

    def targets(*names: str) -> dict[str, Any]:
        made = settings()
        made["config_groups"]["group_0"]["targets"] = list(names)
        return made

    return [
        ("ignored", None, settings(ignore=["re:.*up_proj"]), "the settings exclude model.layers.0.mlp.up_proj"),
        ("no-target", None, targets("re:.*self_attn.*"), "no group of the settings has model.layers.0.mlp.gate_proj"),
        ("format", None, compressed_settings(INTS), "the format of a weight contradicts its name"),
        ("sparse", None, settings(sparsity_config={"format": "sparse-24-bitmask"}), "value of sparsity_config"),
        ("transformed", None, settings(transform_config={"a": 1}), "unsupported value of transform_config"),
        ("bits", None, weights(num_bits=3), "unsupported value of num_bits"),
        ("groups", None, weights(group_size=64), "has 2 groups, but the settings give 1"),
        ("zeros", None, weights(symmetric=False), "lacks model.layers.0.self_attn.q_proj.weight_zero_point"),
        ("shape", put(".weight_shape", 1, 65), settings(), "does not have the shape"),
        ("negative", put(".weight_shape", 1, -64), settings(), "does not have the shape"),
        ("scale", put(".weight_scale", (3, 1), np.inf), settings(), "a scale is NaN, infinite or zero"),
    ]


@pytest.mark.parametrize(
    ("change", "settings", "match"),
    [each[1:] for each in compressed_damage()],
    ids=[each[0] for each in compressed_damage()],
)
def test_a_damaged_folder_of_compressed_tensors_is_refused(
    change: Any, settings: dict[str, Any], match: str, tmp_path: Path
) -> None:
    folder, _ = write_folder(tmp_path, compressed(), settings, change=change or (lambda tensors: None))
    with pytest.raises(CheckpointError, match=match):
        ModelSource.open(folder).resolve()


def state_of(**changes: Any) -> Any:
    """Return a change of the JSON in a quant_state."""
    name = f"{UP}.weight.quant_state.bitsandbytes__nf4"

    def change(tensors: Stored) -> None:
        text = json.dumps({**json.loads(tensors[name].tobytes()), **changes}).encode()
        tensors[name] = np.frombuffer(text, np.uint8)

    return change


def described(**changes: Any) -> Any:
    """Return a change of the JSON that describes a tensor of torchao."""

    def change(tensors: Stored) -> None:
        found = json.loads(tensors[f"{UP}.weight"])
        data = changes.pop("_data", {})
        data = {**found["_data"], **data} if isinstance(data, dict) else data
        tensors[f"{UP}.weight"] = json.dumps({**found, "_data": data, **changes})

    return change


OTHER_DAMAGE: list[tuple[str, Encoder, Any, Any, str]] = [
    ("nf4-shape", bitsandbytes(), BNB, state_of(shape=[64, 64, 2]), "the shape of a weight must be two"),
    ("nf4-large", bitsandbytes(), BNB, state_of(shape=[1 << 40, 64]), "the shape of a weight must be two"),
    ("nf4-other-shape", bitsandbytes(), BNB, state_of(shape=[64, 64]), "a part of a quantized weight does not fit"),
    ("nf4-block", bitsandbytes(), BNB, state_of(blocksize=0), "unsupported blocksize"),
    ("nf4-type", bitsandbytes(), BNB, state_of(quant_type="fp4"), "names another type"),
    ("nf4-json", bitsandbytes(), BNB, put(".weight.quant_state.bitsandbytes__nf4", 0, 0), "JSON|begin|object|value"),
    ("nf4-scale", bitsandbytes(), BNB, put(".weight.absmax", 3, np.nan), "a scale is NaN or infinite"),
    ("nf4-8-bit", bitsandbytes(), {**BNB, "load_in_8bit": True}, None, "unsupported value of load_in_8bit"),
    ("nf4-storage", bitsandbytes(), {**BNB, "bnb_4bit_quant_storage": "bfloat16"}, None, "bnb_4bit_quant_storage"),
    ("int8-order", llm_int8(), BNB_8, put(".weight_format", (), 2), "in the order of a GPU kernel"),
    ("int8-scale", llm_int8(), BNB_8, put(".SCB", 3, np.inf), "a scale is NaN or infinite"),
    ("int-large", integers(), compressed_settings(INTS), put(".weight_scale", 3, 1e38), "weights may be infinite"),
    ("int8-and-4", llm_int8(), {**BNB_8, "load_in_4bit": True}, None, "unsupported value of load_in_8bit"),
    *[
        (f"torchao-{kind}", torchao(), TORCHAO, described(_type=kind), f"torchao\n.*{kind}")
        for kind in ("Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor", "MXTensor", "NVFP4Tensor")
    ],
    ("torchao-undescribed", torchao(), TORCHAO, drop(".weight"), "unsupported tensor of torchao"),
    ("torchao-factor", torchao(), TORCHAO, described(_tensor_data_names=["act_pre_scale"]), "is damaged or not supp"),
    ("torchao-data", torchao(), TORCHAO, described(_data=[]), "is damaged or not supported"),
    ("torchao-block", torchao(), TORCHAO, described(_data={"block_size": [1, 16]}), "one number per block of 1 x 16"),
    ("torchao-range", torchao(INTX, 32, bits=4), TORCHAO, put("._weight_qdata", (0, 1), 9), "range of 4 bits"),
    ("torchao-target", torchao(INTX), TORCHAO, described(_data={"target_dtype": 4}), "unsupported dtype of integers"),
    ("fp8-nan", floats("tensor"), FP8, put(".weight", (1, 1), np.nan), "a weight is NaN"),
    ("fp8-block", floats("block"), {**FP8, "weight_block_size": [64, 64]}, None, "one number per block of 64 x 64"),
    ("fp8-block-size", floats("tensor"), {**FP8, "weight_block_size": [0, 1]}, None, "must be two positive numbers"),
    ("fp8-other", floats("tensor"), {**FP8, "fmt": "e5m2"}, None, "unsupported value of fmt"),
    ("awq-version", awq(), {**AWQ_SETTINGS, "version": "exllama"}, None, "unsupported value of version"),
    ("awq-bits", awq(), {**AWQ_SETTINGS, "bits": 8}, None, "unsupported value of bits"),
    ("awq-symmetric", awq(), {**AWQ_SETTINGS, "zero_point": False}, None, "unsupported value of zero_point"),
    ("awq-gemv", awq(), {**AWQ_SETTINGS, "version": "gemv"}, None, "a part of a quantized weight does not fit"),
]


@pytest.mark.parametrize(
    ("encode", "settings", "change", "match"), [d[1:] for d in OTHER_DAMAGE], ids=[d[0] for d in OTHER_DAMAGE]
)
def test_a_damaged_folder_of_other_methods_is_refused(
    encode: Encoder, settings: Any, change: Any, match: str, tmp_path: Path
) -> None:
    folder, _ = write_folder(tmp_path, encode, settings, change=change or (lambda tensors: None))
    with pytest.raises(CheckpointError, match=match):
        treadle.compile(folder, backend="numpy")


@pytest.mark.parametrize("layout", ["fp8-tensor", "nf4"])
def test_damaged_numbers_are_refused_when_panels_are_packed(layout: str, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    encode, settings = next((encode, settings) for name, encode, settings, _ in LAYOUTS if name == layout)
    change = put(".weight", (0, 1), np.nan) if layout == "fp8-tensor" else put(".weight.absmax", 3, np.nan)
    folder, _ = write_folder(tmp_path, encode, settings, change=change)
    with pytest.raises(CheckpointError, match=r"a (weight|scale) is NaN") as error:
        treadle.compile(folder, backend="tvm")
    assert "model.layers.1.mlp.up_proj.weight" in str(error.value) and "byte" in str(error.value)


def test_damaged_folders_of_every_layout_are_read_or_refused(tmp_path: Path) -> None:
    """A sample of `python -m tests.fuzz.quantized_folders`."""
    for number, (name, encode, settings, _) in enumerate(LAYOUTS):
        found = run(encode, settings, 4, number, tmp_path / name)
        assert set(found) <= {"read", "refused"}, found


@pytest.mark.parametrize("layout", ["awq", "int", "gptq-8", "fp8-bfloat16"])
@pytest.mark.parametrize("scheme", ["int8", "int8-weights"])
def test_the_rest_of_a_quantized_model_is_quantized(layout: str, scheme: str, tmp_path: Path) -> None:
    """The output's weight is not quantized in the folder; the layers, which are functions, have encoded weights."""
    encode, settings = next((encode, settings) for name, encode, settings, _ in LAYOUTS if name == layout)
    folder, wide = write_folder(tmp_path, encode, settings)
    expected = output(treadle.compile(wide, backend="numpy"))
    made = treadle.compile(folder, backend="numpy", quantize=scheme)
    got = output(made)
    assert str(made.graph.parameters["lm_head.weight"].type.encoding) == "int8_rows"
    cosine = (got * expected).sum() / np.sqrt((got * got).sum() * (expected * expected).sum())
    assert 0.99 < cosine < 1.0001
