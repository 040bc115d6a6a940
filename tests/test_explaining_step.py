"""`treadle explain MODEL step` and `treadle inspect MODEL --entry NAME`: the derived step, explained and printed."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from tests.golden import Golden
from tests.stepped_models import MODELS
from treadle.cli.application import app
from treadle.explaining.step import explain_step
from treadle.ir.text.parser import parse_graph

SMALL = ("--set", "layers=2", "--set", "dim=48", "--set", "heads=4", "--set", "vocab=50")


def report(*arguments: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == exit_code, result.output
    return result.output


def without_lines(text: str) -> str:
    """Remove the lines of the models' own declarations, which change for other reasons."""
    return re.sub(r"((?:models|tests)/\w+\.py):\d+", r"\1", text)


def test_the_step_of_a_decoder(golden: Golden) -> None:
    golden("explain/step_gpt2.txt", without_lines(str(explain_step("gpt2", layers=2))))


def test_the_step_of_an_encoder_decoder(golden: Golden) -> None:
    golden("explain/step_t5.txt", without_lines(str(explain_step("t5", layers=2, decoder_layers=2))))


def test_the_step_of_rings_and_sums(golden: Golden) -> None:
    golden("explain/step_summed.txt", without_lines(str(explain_step(MODELS["summed"]))))


def test_repetitions_of_a_shared_block_have_states_each() -> None:
    facts = explain_step(MODELS["repeated"]).as_dict()["states"]
    found = {each["name"]: each["count"] for each in facts}
    assert found["h.{0..1}.attn.k"] == 2
    assert [found[f"h.{{0..1}}.inner.{n}.near.k"] for n in range(2)] == [2, 2]


def test_facts_are_data() -> None:
    facts = json.loads(report("explain", "gpt2", "step", *SMALL, "--json"))
    assert facts["axis"] == "S"
    assert [entry["name"] for entry in facts["entries"]] == ["prefill", "step", "verify"]
    assert facts["bytes_per_token"] == 2 * 2 * 48 * 4, "keys and values of two layers, in float32"
    keys, values = facts["states"]
    assert (keys["name"], keys["count"], keys["bytes"], keys["unit"]) == ("h.{0..1}.attn.k", 2, 2 * 48 * 4, "token")
    assert values["name"] == "h.{0..1}.attn.v"
    attention = next(change for change in facts["changed"] if change["op"] == "attention")
    assert "models/gpt2.py" in attention["why"]
    assert "appends" in attention["became"]


@pytest.mark.parametrize("entry", ["prefill", "step", "verify"])
def test_an_entry_is_printed_with_what_it_calls(entry: str) -> None:
    text = report("inspect", "gpt2", "--entry", entry, *SMALL)
    graph = parse_graph("\n".join(line for line in text.splitlines() if not line.startswith("#")))
    assert graph.entry_names == (entry,)
    assert set(graph.states) == {f"h.{n}.attn.{x}" for n in range(2) for x in "kv"}
    assert ("cached_attention" in text, "append" in text) == (True, True)


def test_an_entry_that_is_not_there_is_refused() -> None:
    assert "one of prefill, step, verify" in report("inspect", "gpt2", "--entry", "main", *SMALL, exit_code=2)
    assert "--entry alone" in report("inspect", "gpt2", "--entry", "step", "--raw", *SMALL, exit_code=2)
    assert "no axis that may be stepped" in report("explain", "bert", "step", *SMALL, exit_code=2)
