"""A sample of the chains that tests/fuzz/windows.py draws."""

from __future__ import annotations

import pytest

from tests.window_chains import onnx_verdict, torch_verdict


@pytest.mark.parametrize("start", range(0, 24, 8))
def test_chains_of_onnx_give_what_onnx_runtime_gives(start: int) -> None:
    pytest.importorskip("onnxruntime")
    found = {seed: verdict for seed in range(start, start + 8) if (verdict := onnx_verdict(seed)) != "equal"}
    assert not found


@pytest.mark.parametrize("start", range(0, 12, 4))
def test_chains_of_pytorch_give_what_pytorch_gives(start: int) -> None:
    pytest.importorskip("torch")
    found = {seed: verdict for seed in range(start, start + 4) if (verdict := torch_verdict(seed)) != "equal"}
    assert not found
