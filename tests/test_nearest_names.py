"""Nearest names: the index by parts finds the same names as a comparison with every name."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

import pytest

from treadle.files.nearest_names import NearestNames, nearest_path, with_nearest_suffix

LAYERS = [f"h.{i}.mlp.{part}.weight" for i in range(100) for part in ("up", "gate", "down", "norm")]


@pytest.mark.parametrize("others", [0, 100, 400])
@pytest.mark.parametrize(
    "wanted",
    [
        "h.57.mlp.gaet.weight",
        "decoder.embed_token.weight",
        "h.3.attn.out.weight",
        "mlp.norm.weight",
        "bias",
        "decoder.mlp.up.weight",
    ],
)
def test_many_names_are_searched_by_their_parts_as_if_one_by_one(wanted: str, others: int) -> None:
    """Rare parts of names count more than common ones, at any position of the name in the file."""
    names = [*LAYERS[:others], "decoder.embed_tokens", *LAYERS[others:], "x" * 201]
    assert NearestNames(names).of(wanted) == get_close_matches(wanted, names, 1, 0.6)


@pytest.mark.parametrize(
    ("wanted", "near"),
    [
        ("h.0.mlp.up.weigth", ["h.0.mlp.up.weight"]),
        ("wte.wieght", ["wte.weight"]),
        ("module.wte.weight", ["wte.weight"]),
        ("h.0.mlp.up", ["h.0.mlp.up.weight"]),
        ("h.0.mpl.up.weight", ["h.0.mlp.up.weight"]),
        ("x.weight", []),
        ("lm_head.weight", []),
        ("h.10.mlp.up.weight", []),
        ("h.0.mlp.gate.weight", []),
        ("weight", []),
        ("", []),
    ],
)
def test_a_dotted_name_is_near_only_if_its_differing_parts_are(wanted: str, near: list[str]) -> None:
    assert NearestNames(["wte.weight", "h.0.mlp.up.weight", "ln_f.weight"]).of_parts(wanted) == near


def test_compared_values_are_bounded() -> None:
    assert NearestNames(["x" * 201]).of("x" * 200) == NearestNames(["x" * 200]).of("x" * 201) == []
    assert NearestNames(["x" * 200]).of("x" * 200) == ["x" * 200]


@pytest.mark.parametrize(
    ("path", "suffixes", "path_with_suffix"),
    [
        ("x.onnnx", [".onnx"], "x.onnx"),
        ("below/x.ONNX", [".onnx"], "below/x.onnx"),
        ("x.tredle", [".treadle"], "x.treadle"),
        ("x.gv2", [".dot", ".gv"], "x.gv"),
        ("x.bin", [".treadle"], "x.treadle"),
        ("x.v2", [".treadle"], "x.v2.treadle"),
        ("llama-3.1", [".onnx"], "llama-3.1.onnx"),
        ("below.onnnx/x", [".onnx"], "below.onnnx/x.onnx"),
        (".onnnx", [".onnx"], ".onnnx.onnx"),
    ],
)
def test_a_misspelled_suffix_is_replaced(path: str, suffixes: list[str], path_with_suffix: str) -> None:
    assert with_nearest_suffix(path, suffixes) == path_with_suffix


def test_the_nearest_path_exists_and_is_of_the_same_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for name in ("corpus.txt", "corpus.json", "memo.txt", "corp\x1bus.txt"):
        (tmp_path / "texts" / name).touch()
    assert nearest_path("texts/corpsu.txt") == nearest_path("txets/corpsu.txt") == "texts/corpus.txt"
    assert nearest_path(tmp_path / "texts" / "corpsu.txt") == str(tmp_path / "texts" / "corpus.txt")
    assert nearest_path("texts/corpus.txt") is None  # it exists
    assert nearest_path("texts/mk.txt") is None  # only the suffix of memo.txt is similar
    for path in ("texts/corpus.csv", "corpus.txt", "texts/corpus.txt/corpus.txt", "\0", "x" * 5000, ""):
        assert nearest_path(path) is None
