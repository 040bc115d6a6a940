"""ONNX's own node tests, on NumPy and on PyTorch: each passes, or is refused at import and listed.

tests/onnx_refused.txt is the list, with a line and a reason for each refused test. A refused test that is not listed
fails, and so does a listed one that passes: run `python -m tests.onnx_cases` to rewrite the list, and read the diff.
"""

from __future__ import annotations

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch")

import onnx

from tests.onnx_cases import LISTED, QUANTIZATION, cases, is_core, listed, operators, verdict

SHARDS = 8

if not onnx.__version__.startswith(LISTED + "."):
    pytest.skip(f"the list is of onnx {LISTED}, this is {onnx.__version__}", allow_module_level=True)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_case_passes_or_is_a_listed_refusal(shard: int) -> None:
    refused = listed()
    wrong = []
    for name in sorted(cases())[shard::SHARDS]:
        found = verdict(cases()[name])
        if found.outcome == "wrong":
            wrong.append(f"{name}: {found.why}")
        elif found.outcome == "refused" and name not in refused:
            wrong.append(f"{name} is refused and not listed: {found.why}")
        elif found.outcome == "passes" and name in refused:
            wrong.append(f"{name} passes and is listed as refused")
        elif found.outcome == "refused" and refused[name] != found.why:
            wrong.append(f"{name} is refused for another reason than listed: {found.why}")
    assert not wrong, "\n".join(wrong)


def test_the_operators_of_transformers_are_covered() -> None:
    """At least 815 of 833 core cases are not listed, and no case of quantization is listed."""
    core = [name for name, case in cases().items() if is_core(case)]
    assert len(core) == 833
    assert len([name for name in core if name not in listed()]) >= 815
    assert [name for name in listed() if operators(cases()[name]) & QUANTIZATION] == []


def test_the_list_names_cases_that_exist() -> None:
    assert set(listed()) <= set(cases())
    assert list(listed()) == sorted(listed())
