"""Limits on the bytes that are read before a file is refused, on the values in its JSON, and on nesting depth."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treadle.artifacts.reading import ArtifactLimits, open_artifact
from treadle.artifacts.writing import write_artifact
from treadle.entry_functions import compile
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.safetensors_file import CheckpointLimits as HeaderLimits
from treadle.ir.errors import CheckpointError
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.scanner import TextLimits
from treadle.npy_files import read_npy

MIB = 2**20


class Read(BaseException):
    """A file that records the arguments of its read calls."""


READERS: list[tuple[str, str, Callable[[Any, Path], object], dict[str, int]]] = [
    (
        "tasks.pooling",
        "modules.json",
        lambda m, p: m.read_pooling(ModelFolder.find(p)),
        {"bytes": MIB, "nesting": 16, "values": 10_000},
    ),
    (
        "frontends.model_folder",
        "generation_config.json",
        lambda m, p: m.ModelFolder.find(p).read_settings("generation_config.json"),
        {"bytes": 4 * MIB, "nesting": 32, "values": 200_000},
    ),
    ("tasks.images.reading", "a.png", lambda m, p: m.open_image(p / "a.png"), {"bytes": 256 * MIB}),
    ("tasks.sound", "a.wav", lambda m, p: m.read_sound(p / "a.wav", rate=16_000), {"bytes": 1024 * MIB}),
    (
        "explaining.memory",
        "a.json",
        lambda m, p: m.read_memory(p / "a.json"),
        {"bytes": 64 * MIB, "nesting": 16, "values": 1_000_000},
    ),
    ("program.text_files", "a.txt", lambda m, p: m.read_text(str(p / "a.txt")), {"bytes": 256 * MIB}),
]


@pytest.mark.parametrize(("module", "name", "read", "limits"), READERS, ids=[f"{m}-{n}" for m, n, _, _ in READERS])
def test_readable_files(
    module: str,
    name: str,
    read: Callable[[Any, Path], object],
    limits: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("[]")
    asked: dict[str, int] = {}

    def regular(path: Any, limit: int, *more: Any) -> bytes:
        asked["bytes"] = limit
        if limits.keys() == asked.keys():
            raise Read
        return b"{}"

    def parsed(*given: Any, nesting: int, values: int) -> Any:
        raise Read(asked.update(nesting=nesting, values=values))

    found = import_module(f"treadle.{module}")
    monkeypatch.setattr(ModelFolder, "read", lambda _, *given: regular(*given))
    monkeypatch.setattr(found, "read_regular", regular, raising=False)
    for reader in ("read_json_object", "JsonReader"):
        monkeypatch.setattr(found, reader, parsed, raising=False)
    with pytest.raises(Read):
        read(found, tmp_path)
    assert asked == limits


def test_an_artifact_may_ask_for_what_its_page_says() -> None:
    """The limits equal the numbers in docs/artifacts.md."""
    header = HeaderLimits(header_bytes=4 * MIB, tensors=10_000, values=10_000, rank=16)
    graph = TextLimits(
        characters=8 * MIB, functions=500, nodes=4_000, operands=20_000, parameters=5_000, literal_bytes=8 * MIB,
        rank=16, items=256, nesting=8, type_characters=300, expression_characters=1_000, symbols=500, arguments=5_000,
        name_characters=1_000, work=300_000,
    )  # fmt: skip
    assert ArtifactLimits() == ArtifactLimits(header, graph, 4 * MIB, 50_000, 4 * MIB, 200_000, 16_384)
    page = (Path(__file__).parents[1] / "docs" / "artifacts.md").read_text(encoding="utf-8")
    for report in (
        "4 MiB",
        "10,000",
        "50,000",
        "200,000",
        "16,384",
        "8 Mi,",
        "4,000 and 20,000",
        "5,000",
        "500 each",
        "300,000",
    ):
        assert report in page, report


def test_an_array_may_take_four_gigabytes(tmp_path: Path) -> None:
    """A sparse file, whose content is not read."""
    path = tmp_path / "x.npy"
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (4096 * MIB + 1,)}
        np.lib.format.write_array_header_1_0(file, header)
        os.truncate(path, file.tell() + 4096 * MIB + 1)
    with pytest.raises(CheckpointError, match="the array is larger than the limit") as caught:
        read_npy(path)
    assert caught.value.received == "4294967297 bytes, limit 4294967296"


def test_a_seed_of_an_artifact_has_39_digits_at_most(tmp_path: Path) -> None:
    made = compile(parse_graph("graph g { main(x: f32[4]) -> (y: f32[4]) { y = relu(x) return y = y } }"))
    path = tmp_path / "g.treadle"
    write_artifact(path, "g", "numpy", "cpu", made.optimized, {}, 10**39 - 1)
    assert open_artifact(path).seed == 10**39 - 1
    write_artifact(path, "g", "numpy", "cpu", made.optimized, {}, 10**39)
    with pytest.raises(CheckpointError, match="the seed must be digits or nothing"):
        open_artifact(path)
