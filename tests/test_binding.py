"""Binding parameters to checkpoint tensors: slices, ties, prefixes, conversions, and the errors of mismatches."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from tests.fuzz.safetensors_files import header_and_data
from treadle.files.shown_names import printable
from treadle.frontends.binding import Source, bind
from treadle.frontends.huggingface import open_checkpoint
from treadle.frontends.safetensors_file import SafetensorsFile
from treadle.ir.errors import CheckpointError
from treadle.ir.types import f32

Array = npt.NDArray[Any]


def draw(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def gpt2(layers: int = 3, dim: int = 4) -> dict[str, Array]:
    """Return a checkpoint in GPT-2's form: weights are stored as [in, out], with queries, keys and values in one
    tensor.
    """
    held = {"wte.weight": draw(10, dim), "ln_f.weight": draw(dim), "ln_f.bias": draw(dim)}
    for i in range(layers):
        held[f"h.{i}.attn.c_attn.weight"] = draw(dim, 3 * dim)
        held[f"h.{i}.attn.c_attn.bias"] = draw(3 * dim)
        held[f"h.{i}.attn.bias"] = np.tri(8, dtype=np.float32)
    return held


def gpt2_parameters(layers: int = 3, dim: int = 4) -> dict[str, tuple[tuple[int, ...], str]]:
    needed: dict[str, tuple[tuple[int, ...], str]] = {"wte.weight": ((10, dim), "f32")}
    for i in range(layers):
        for part in "qkv":
            needed[f"h.{i}.attn.{part}.weight"] = (dim, dim), "f32"
            needed[f"h.{i}.attn.{part}.bias"] = (dim,), "f32"
    needed |= {f"ln_f.{part}": ((dim,), "f32") for part in ("weight", "bias")}
    return needed | {"lm_head.weight": ((10, dim), "f32")}


def gpt2_table(dim: int = 4) -> dict[str, Any]:
    table: dict[str, Any] = {"lm_head.weight": ("lm_head.weight", "wte.weight")}
    for at, part in enumerate("qkv"):
        cut = (at * dim, (at + 1) * dim)
        table[f"h.{{i}}.attn.{part}.weight"] = Source("h.{i}.attn.c_attn.weight", transpose=True, rows=cut)
        table[f"h.{{i}}.attn.{part}.bias"] = Source("h.{i}.attn.c_attn.bias", rows=cut)
    return table


def store(folder: Path, held: Mapping[str, Array]) -> SafetensorsFile:
    save_file(dict(held), folder / "model.safetensors")
    return SafetensorsFile.open(folder / "model.safetensors")


def mismatch(*arguments: Any, **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        bind(*arguments, **options)
    return caught.value


# -- bindings ----------------------------------------------------------------------------------------------


def test_parts_are_views_of_the_file(tmp_path: Path) -> None:
    held = gpt2()
    file = store(tmp_path, held)
    bound = bind(gpt2_parameters(), gpt2_table(), file, ignore=["h.{i}.attn.bias"])
    for i in range(3):
        fused = held[f"h.{i}.attn.c_attn.weight"]
        for at, part in enumerate("qkv"):
            array = bound.arrays[f"h.{i}.attn.{part}.weight"]
            np.testing.assert_array_equal(array, fused[:, 4 * at : 4 * at + 4].T)
            assert np.shares_memory(array, file.raw(f"h.{i}.attn.c_attn.weight"))
            np.testing.assert_array_equal(
                bound.arrays[f"h.{i}.attn.{part}.bias"],
                held[f"h.{i}.attn.c_attn.bias"][4 * at : 4 * at + 4],
            )
    assert np.shares_memory(bound.arrays["lm_head.weight"], bound.arrays["wte.weight"])
    assert list(bound.arrays) == list(gpt2_parameters())
    assert not any(array.flags.writeable for array in bound.arrays.values())
    assert bound.unused == ()
    assert bound.converted == {}
    assert str(bound.sources["h.1.attn.k.weight"]) == "h.1.attn.c_attn.weight.T[4:8]"


def test_a_stored_tie_goes_before_its_other_name(tmp_path: Path) -> None:
    bound = bind(
        {"lm_head.weight": ((10, 4), "f32")},
        gpt2_table(),
        store(tmp_path, gpt2() | {"lm_head.weight": draw(10, 4) + 1}),
    )
    assert bound.sources["lm_head.weight"] == Source("lm_head.weight")


@pytest.mark.parametrize("stored", ["", "transformer."])
def test_prefixes(tmp_path: Path, stored: str) -> None:
    """Some names have the prefix and some do not, as in a checkpoint with a head."""
    held = {stored + name: array for name, array in gpt2().items()} | {"lm_head.weight": draw(10, 4)}
    bound = bind(
        gpt2_parameters(),
        gpt2_table(),
        store(tmp_path, held),
        prefixes=("", "transformer."),
        ignore=["h.{i}.attn.bias"],
    )
    assert bound.unused == ()
    assert bound.sources["ln_f.bias"].name == f"{stored}ln_f.bias"


@pytest.mark.parametrize(("weight", "bias"), [("weight", "bias"), ("gamma", "beta")])
def test_alternative_names(tmp_path: Path, weight: str, bias: str) -> None:
    held = {f"layer.{i}.LayerNorm.{part}": draw(4) + i for i in range(2) for part in (weight, bias)}
    table = {
        "layers.{i}.norm.weight": ("layer.{i}.LayerNorm.weight", "layer.{i}.LayerNorm.gamma"),
        "layers.{i}.norm.bias": ("layer.{i}.LayerNorm.bias", "layer.{i}.LayerNorm.beta"),
    }
    needed = {f"layers.{i}.norm.{part}": ((4,), f32) for i in range(2) for part in ("weight", "bias")}
    bound = bind(needed, table, store(tmp_path, held))
    np.testing.assert_array_equal(bound.arrays["layers.1.norm.weight"], draw(4) + 1)
    assert bound.unused == ()


def test_patterns(tmp_path: Path) -> None:
    """Patterns with several numbers, and with a number that occurs twice; an exact name is tried before a pattern, and
    the first of two patterns wins.
    """
    held = {name: np.full(1, at, np.float32) for at, name in enumerate(["b.2.e.7", "c.4", "special", "first.5"])}
    table = {
        "moe.{layer}.{expert}.w": "b.{layer}.e.{expert}",
        "twice.{i}.{i}": "c.{i}",
        "x.{i}": "first.{i}",
        "x.9": "special",
        "x.{j}": "absent.{j}",
        "a.b*c": "c.4",
    }
    needed = dict.fromkeys(("moe.2.7.w", "twice.4.4", "x.5", "x.9", "special", "a.b*c"), ((1,), "f32"))
    bound = bind(needed, table, store(tmp_path, held))
    assert {name: float(array[0]) for name, array in bound.arrays.items()} == {
        "moe.2.7.w": 0, "twice.4.4": 1, "x.5": 3, "x.9": 2, "special": 2, "a.b*c": 1,
    }  # fmt: skip
    assert (
        "lacks 2" in mismatch({"twice.4.5": ((1,), "f32"), "a.bbc": ((1,), "f32")}, table, store(tmp_path, held)).what
    )


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (Source("w"), np.s_[:, :]),
        (Source("w", rows=(1, 3)), np.s_[1:3]),
        (Source("w", cols=(0, 2)), np.s_[:, 0:2]),
        (Source("w", rows=(2, 2), cols=(1, 6)), np.s_[2:2, 1:6]),
    ],
)
def test_slices(tmp_path: Path, source: Source, wanted: Any) -> None:
    held = {"w": draw(4, 6)}
    part = held["w"][wanted]
    bound = bind({"p": (part.shape, "f32")}, {"p": source}, store(tmp_path, held))
    np.testing.assert_array_equal(bound.arrays["p"], part)
    swapped = Source("w", transpose=True, rows=source.cols, cols=source.rows)
    bound = bind({"p": (part.T.shape, "f32")}, {"p": swapped}, store(tmp_path, held))
    np.testing.assert_array_equal(bound.arrays["p"], part.T)


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_rows_of_each_group(tmp_path: Path, groups: int) -> None:
    """The second and third row of each group, and two columns; also for a matrix that is stored transposed."""
    held = {"w": draw(12, 6)}
    own = [row for row in range(12) if row % (12 // groups) in (1, 2)]
    part = held["w"][own][:, 1:3]
    for given, transpose in ((held, False), ({"w": np.ascontiguousarray(held["w"].T)}, True)):
        source = Source("w", transpose=transpose, rows=(1, 3), cols=(1, 3), groups=groups)
        bound = bind({"p": (part.shape, "f32")}, {"p": source}, store(tmp_path, given))
        np.testing.assert_array_equal(bound.arrays["p"], part)
    assert Source("w", rows=(1, 3), groups=5).shape((12, 6)) is None


@pytest.mark.parametrize(
    ("held", "needed", "value"),
    [
        ("float16", "f32", 1.5), ("float64", "f32", 0.1), ("float32", "f16", 0.1), ("float32", "bf16", 0.1),
        ("int32", "i64", -7), ("uint8", "i32", 200), ("int8", "i16", -7),
    ],
)  # fmt: skip
def test_conversions(tmp_path: Path, held: str, needed: str, value: float) -> None:
    array = np.full((2, 3), value, held)
    bound = bind({"p": ((2, 3), needed)}, {}, store(tmp_path, {"p": array}))
    dtype = {"f32": "f4", "f16": "f2", "bf16": "f4", "i64": "i8", "i32": "i4", "i16": "i2"}[needed]
    assert bound.arrays["p"].dtype == dtype
    np.testing.assert_array_equal(bound.arrays["p"], array.astype(dtype))
    assert bound.converted["p"][1] == needed
    assert not bound.arrays["p"].flags.writeable


def test_bf16_is_widened_once_for_all_its_parts(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    header = {"qkv": {"dtype": "BF16", "shape": [6, 2], "data_offsets": [0, 24]}}
    path.write_bytes(header_and_data(header, np.arange(12, dtype="<u2").tobytes()))
    table = {f"{part}": Source("qkv", rows=(2 * at, 2 * at + 2)) for at, part in enumerate("qkv")}
    for dtype in ("f32", "bf16"):
        bound = bind(dict.fromkeys("qkv", ((2, 2), dtype)), table, SafetensorsFile.open(path))
        assert bound.arrays["q"].base is bound.arrays["v"].base
        assert (len(bound.converted) == 3) == (dtype == "f32")


def test_unused_are_reported_in_the_files_order(tmp_path: Path) -> None:
    bound = bind({"ln_f.bias": ((4,), "f32")}, {}, store(tmp_path, gpt2(1)), ignore=["wte.weight"])
    names = [name for name in store(tmp_path, gpt2(1)).names() if name not in ("ln_f.bias", "wte.weight")]
    assert list(bound.unused) == names


def test_a_folder_binds_as_a_file_does(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = store(tmp_path, gpt2())
    one = bind(gpt2_parameters(), gpt2_table(), file)
    two = bind(gpt2_parameters(), gpt2_table(), open_checkpoint(tmp_path))
    assert one.sources == two.sources
    assert one.unused == two.unused


# -- mismatches --------------------------------------------------------------------------------------------


def test_text_mismatch(tmp_path: Path) -> None:
    """One error lists everything: missing names with the nearest names, and wrong shapes with both shapes."""
    held = gpt2()
    held = {name.replace("c_attn.w", "c_atn.w"): array for name, array in held.items()}
    held["wte.weight"] = draw(9, 4)
    held["h.1.attn.c_attn.bias"] = draw(4)
    held["ln_f.gamma"] = held.pop("ln_f.weight")
    del held["ln_f.bias"]
    error = mismatch(gpt2_parameters(), gpt2_table(), store(tmp_path, held))
    assert (
        str(error).replace(str(tmp_path), "FOLDER")
        == """
the checkpoint lacks 11 of the 22 tensors that the model needs and holds 4 that do not fit
  received  11 tensors
  in        FOLDER/model.safetensors
            missing:
              h.{i}.attn.q.weight <- h.{i}.attn.c_attn.weight; nearest: h.{i}.attn.c_atn.weight; i = 0..2
              h.{i}.attn.k.weight <- h.{i}.attn.c_attn.weight; nearest: h.{i}.attn.c_atn.weight; i = 0..2
              h.{i}.attn.v.weight <- h.{i}.attn.c_attn.weight; nearest: h.{i}.attn.c_atn.weight; i = 0..2
              ln_f.weight; nearest: wte.weight
              ln_f.bias; nearest: ln_f.gamma
            do not fit:
              wte.weight needs f32[10, 4]; wte.weight is f32[9, 4]
              h.1.attn.k.bias needs f32[4]; h.1.attn.c_attn.bias is f32[4] and has no part [4:8]
              h.1.attn.v.bias needs f32[4]; h.1.attn.c_attn.bias is f32[4] and has no part [8:12]
              lm_head.weight needs f32[10, 4]; wte.weight is f32[9, 4]
            unused by the model (7):
              h.{0..2}.attn.bias
              h.{0..2}.attn.c_atn.weight
              ln_f.gamma
  try       check that the configuration and the table of names belong to these weights
""".strip("\n")
    )


def test_missing_names_are_told_apart_where_they_differ(tmp_path: Path) -> None:
    """Layers 0, 1, 3 lack the tensor; layer 3 has a tensor of another name than layers 0 and 1."""
    held = {f"h.{i}.mlp.c_fc.wieght": draw(2) for i in (0, 1)} | {
        "h.2.mlp.c_fc.weight": draw(2),
        "h.3.mlp.cfc.weight": draw(2),
    }
    needed = {f"h.{i}.up": ((2,), "f32") for i in range(4)}
    lines = (mismatch(needed, {"h.{i}.up": "h.{i}.mlp.c_fc.weight"}, store(tmp_path, held)).within or "").splitlines()
    assert lines[2:4] == [
        "  h.{i}.up <- h.{i}.mlp.c_fc.weight; nearest: h.{i}.mlp.c_fc.wieght; i = 0..1",
        "  h.3.up <- h.3.mlp.c_fc.weight; nearest: h.3.mlp.cfc.weight",
    ]


@pytest.mark.parametrize(
    ("source", "shape", "dtype", "words"),
    [
        (Source("w"), (6, 4), "f32", "p needs f32[6, 4]; w is f32[4, 6]"),
        (Source("w", transpose=True), (4, 6), "f32", "w is f32[4, 6], and w.T is f32[6, 4]"),
        (Source("w", rows=(0, 5)), (5, 6), "f32", "w is f32[4, 6] and has no part [0:5]"),
        (Source("w", rows=(0, 3)), (4, 6), "f32", "and w[0:3] is f32[3, 6]"),
        (Source("w", cols=(2, 7)), (4, 5), "f32", "has no part [:, 2:7]"),
        (Source("b", cols=(0, 1)), (6,), "f32", "has no part [:, 0:1]"),
        (Source("b", transpose=True), (6,), "f32", "has no part .T"),
        (Source("w"), (4, 6), "i64", "which cannot be converted"),
        (Source("n"), (2,), "f32", "which cannot be converted"),
        (Source("n"), (2,), "i32", "which cannot be converted"),
        (Source("n"), (2,), "bool", "which cannot be converted"),
        (Source("w"), (4, 6), "f99", "which cannot be converted"),
    ],
)
def test_misfits(tmp_path: Path, source: Source, shape: Sequence[int], dtype: str, words: str) -> None:
    held = {"w": draw(4, 6), "b": draw(6), "n": np.arange(2)}
    error = mismatch({"p": (shape, dtype)}, {"p": source}, store(tmp_path, held))
    assert words in (error.within or "")


def test_a_value_that_would_become_infinite(tmp_path: Path) -> None:
    held = {"a": np.array([1.0, 1e6, np.inf], np.float32)}
    error = mismatch({"a": ((3,), "f16")}, {}, store(tmp_path, held))
    assert error.what == "a: as f16, 1 finite values would become infinite"
    assert "up to 1e+06" in (error.received or "")


def test_nothing_of_a_tensor_is_read_before_all_fit(tmp_path: Path) -> None:
    """If another tensor is missing, the error is about that tensor, not about a damaged bool."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(header_and_data({"m": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}}, b"\x07"))
    file = SafetensorsFile.open(path)
    assert "lacks 1 of the 2" in mismatch({"m": ((1,), "bool"), "n": ((1,), "bool")}, {}, file).what
    assert "neither 0 nor 1" in mismatch({"m": ((1,), "bool")}, {}, file).what


def test_a_wrong_model_is_told_briefly(tmp_path: Path) -> None:
    """48 layers of another model: the error lists every tensor, with layers folded."""
    held = {f"decoder.blocks.{i}.{part}": draw(1) for i in range(48) for part in ("a", "b", "c")}
    needed = {f"h.{i}.{part}.weight": ((4,), "f32") for i in range(48) for part in ("ln_1", "ln_2", "mlp")}
    table = {f"h.{{i}}.{part}.weight": f"h.{{i}}.{part}.weight" for part in ("ln_1", "ln_2", "mlp")}
    lines = str(mismatch(needed, table, store(tmp_path, held))).splitlines()
    assert len(lines) == 12
    assert "              h.{i}.ln_1.weight; i = 0..47" in lines
    assert "              decoder.blocks.{0..47}.a" in lines


def test_a_long_list_of_unused_names_is_cut(tmp_path: Path) -> None:
    letters = [f"w{chr(97 + i)}" for i in range(26)] + [f"v{chr(97 + i)}" for i in range(16)]
    for count, end in ((40, []), (41, ["  and 1 more lines"]), (42, ["  and 2 more lines"])):
        held = {name: draw(1) for name in letters[:count]}
        lines = (mismatch({"x": ((1,), "f32")}, {}, store(tmp_path, held)).within or "").splitlines()
        at = lines.index(f"unused by the model ({count}):")
        assert lines[at + 1 :] == [f"  {name}" for name in sorted(held)[:40]] + end
    (line,) = [
        each
        for each in (
            mismatch({"x": ((1,), "f32")}, {}, store(tmp_path, {"y" * 500: draw(1)})).within or ""
        ).splitlines()
        if "yyy" in each and "nearest" not in each
    ]
    assert line == f"  {printable('y' * 500, 400)}"


def test_a_nearest_name_is_looked_for_a_hundred_times(tmp_path: Path) -> None:
    held = {f"block{chr(97 + i // 26)}{chr(97 + i % 26)}.weight": draw(1) for i in range(102)}
    needed = {name.replace("weight", "wieght"): ((1,), "f32") for name in held}
    lines = (mismatch(needed, {}, store(tmp_path, held)).within or "").splitlines()
    assert ["nearest" in line for line in lines[2:104]] == [True] * 100 + [False] * 2


def test_names_with_two_numbers_are_listed_one_by_one(tmp_path: Path) -> None:
    table = {"moe.{layer}.{expert}.w": "b.{layer}.e.{expert}"}
    needed = {f"moe.{layer}.{expert}.w": ((1,), "f32") for layer, expert in ((0, 3), (12, 1))}
    lines = (mismatch(needed, table, store(tmp_path, {"a": draw(1)})).within or "").splitlines()
    numbers = "layer = 0, expert = 3; layer = 12, expert = 1"
    assert lines[2] == f"  moe.{{layer}}.{{expert}}.w <- b.{{layer}}.e.{{expert}}; {numbers}"


def test_misfits_of_many_layers_are_folded(tmp_path: Path) -> None:
    held = {f"transformer.h.{i}.c_fc.weight": draw(2, 3) for i in range(4)}
    table = {"h.{i}.up": Source("h.{i}.c_fc.weight", transpose=True)}
    needed = {f"h.{i}.up": ((2, 3), "f32") for i in (0, 1, 3)}
    error = mismatch(needed, table, store(tmp_path, held), prefixes=("", "transformer."))
    assert (error.within or "").splitlines()[2] == (
        "  h.{i}.up needs f32[2, 3]; transformer.h.{i}.c_fc.weight is f32[2, 3], "
        "and transformer.h.{i}.c_fc.weight.T is f32[3, 2]; i = 0..1, 3"
    )


def test_a_mismatch_with_many_names_is_told_in_bounded_work(tmp_path: Path) -> None:
    """20,000 names that look alike, and 2,000 that are missing: the search for nearest names is bounded."""
    tail = "x" * 150
    none = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    path = tmp_path / "m.safetensors"
    path.write_bytes(header_and_data({f"layer.{i}.weight.{tail}": none for i in range(20_000)}, b""))
    file = SafetensorsFile.open(path)
    needed = {f"block.{i}.weight.{tail}y": ((1,), "u8") for i in range(2000)}
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        error = mismatch(needed, {}, file)
    finally:
        sys.setprofile(None)
    assert "lacks 2000 of the 2000" in error.what
    assert "block.1999." in str(error)
    assert calls < 10_000_000
