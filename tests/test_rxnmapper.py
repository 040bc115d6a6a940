"""RXNMapper's ALBERT with its real weights: the model fills in masked tokens of reactions (Schwaller et al. 2021)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from treadle.backends.registry import backend_names
from treadle.fetching import fetch_model
from treadle.ir.errors import CheckpointError, FrontendError
from treadle.resolving import resolve
from treadle.wheels.pinned_models import PINNED

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from safetensors.torch import save_file

from tests.test_huggingface_models import TOLERANCE, prepare

Array = np.ndarray[Any, Any]

REACTIONS = (
    "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F",
    "CC(=O)Cl.Nc1ccccc1>>CC(=O)Nc1ccccc1",
    "OB(O)c1ccccc1.Brc1ccncc1>>c1ccc(-c2ccncc2)cc1",
    "O=C(O)c1ccccc1.CO>>COC(=O)c1ccccc1",
)

TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|>>|[BCNOSPFIbcnosp().=#+\\/:~@?*$-]|%[0-9]{2}|[0-9]")
"""Tokens of a reaction SMILES: atoms, bonds, branches and rings (Schwaller et al. 2019)."""


@pytest.fixture(scope="module")
def fetched() -> Path:
    try:
        return fetch_model("rxnmapper")
    except FrontendError as error:
        if isinstance(error, CheckpointError):
            raise
        pytest.skip(f"rxnmapper: {error.what}")


@pytest.fixture(scope="module")
def folder(fetched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model's folder, with its pickle converted to safetensors as a user who trusts the file would do."""
    folder = tmp_path_factory.mktemp("rxnmapper")
    shutil.copy(fetched / "config.json", folder)
    tensors = torch.load(fetched / "pytorch_model.bin", weights_only=True, map_location="cpu")
    save_file({name: x.clone() for name, x in tensors.items()}, folder / "model.safetensors")
    return folder


def mask_each(reaction: str, vocabulary: list[str]) -> tuple[Array, Array]:
    """Return a reaction's ids, and a batch in which each row has another token masked."""
    words = TOKEN.findall(reaction)
    assert "".join(words) == reaction
    ids = np.array([vocabulary.index(word) for word in words])
    masked = np.where(np.eye(len(ids), dtype=bool), vocabulary.index("[MASK]"), ids)
    return ids, np.pad(masked, ((0, 0), (1, 1)), constant_values=_ends(vocabulary))


def _ends(vocabulary: list[str]) -> Any:
    return ((0, 0), (vocabulary.index("[CLS]"), vocabulary.index("[SEP]")))


def test_a_pickle_is_not_loaded(fetched: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve(fetched)
    assert "safetensors" in str(caught.value)
    assert "a pickle to convert to safetensors first" in PINNED["rxnmapper"].about


@pytest.mark.parametrize("backend", backend_names())
def test_fills_in_masked_tokens(fetched: Path, folder: Path, backend: str) -> None:
    """Nine of ten tokens, masked one at a time, are recovered.

    The products of a reaction mostly determine its reactants, and vice versa. They do not always: the halogen of a
    leaving group could be another one. Always guessing the most common token would recover three of ten.
    """
    vocabulary = (fetched / "vocab.txt").read_text().splitlines()
    resolved = resolve(folder)
    assert resolved.weights is not None
    run = prepare(backend, resolved.graph, resolved.weights)
    right, commonest = [], []
    for reaction in REACTIONS:
        ids, masked = mask_each(reaction, vocabulary)
        logits = run(tokens=masked)["logits"]
        place = np.arange(len(ids))
        right.extend(logits[place, place + 1].argmax(-1) == ids)
        commonest.extend(ids == np.bincount(ids).argmax())
    assert np.mean(right) >= 0.9
    assert np.mean(commonest) < 0.4


def test_equals_hugging_face(fetched: Path, folder: Path) -> None:
    vocabulary = (fetched / "vocab.txt").read_text().splitlines()
    _, masked = mask_each(REACTIONS[0], vocabulary)
    resolved = resolve(folder)
    assert resolved.weights is not None
    ours = prepare("numpy", resolved.graph, resolved.weights)(tokens=masked[:4])["logits"]
    with torch.no_grad():
        theirs = transformers.AlbertForMaskedLM.from_pretrained(folder)(torch.from_numpy(masked[:4])).logits.numpy()
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < TOLERANCE


def test_one_layer_is_called_twelve_times(folder: Path) -> None:
    """Each of the twelve calls passes the same weights."""
    resolved = resolve(folder)
    calls = [node for node in resolved.graph.main.nodes if node.op.callee is not None]
    weights = [[v for v in call.operands if v is not None and v.kind == "parameter"] for call in calls]
    assert [call.op.callee for call in calls] == ["layer"] * 12
    assert len(weights[0]) == 16
    assert all(each == weights[0] for each in weights)
