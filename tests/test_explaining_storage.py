"""`treadle explain MODEL storage`, and the storage plan in the list of stages."""

from __future__ import annotations

import json

import pytest

from tests.golden import Golden
from tests.test_explaining_layouts import SMALL, TARGETS, report, usable, without_lines
from treadle.entry_functions import compile
from treadle.explaining.storage import StorageReport, explain_storage
from treadle.passes.pipelines import DEFAULT

SHOWN = {**TARGETS, "numpy": "cpu"}


def bert(backend: str) -> StorageReport:
    return explain_storage("bert", backend=backend, target=SHOWN[backend], layers=2)


@pytest.mark.parametrize("backend", SHOWN)
def test_where_each_value_of_a_backend_lies(backend: str, golden: Golden) -> None:
    usable(backend)
    found = bert(backend)
    golden(f"explain/storage_{backend}.txt", without_lines(str(found)))
    golden(f"explain/storage_{backend}.json", without_lines(json.dumps(found.as_dict(), indent=2)))


@pytest.mark.parametrize("backend", SHOWN)
def test_the_command_says_what_the_function_says(backend: str) -> None:
    """The function is called for this machine's CPU."""
    usable(backend)
    found = explain_storage("bert", backend=backend, layers=2)
    words = ("explain", "bert", "storage", "--backend", backend, "--set", "layers=2")
    assert report(*words).split() == str(found).split()
    assert json.loads(report(*words, "--json")) == found.as_dict()


def test_every_value_and_every_weight_is_told() -> None:
    usable("tvm")
    exe = compile("gpt2", backend="tvm", target="x86-64-v4", **SMALL)
    lowered = exe.optimized.lowered
    assert lowered is not None
    found = explain_storage("gpt2", backend="tvm", target="x86-64-v4", **SMALL)
    for each in found.functions:
        function = lowered.graph.functions[each.name]
        values = [*function.arguments, *(v for node in function.nodes for v in node.results)]
        assert len([v for v in each.values if v.kind != "constant"]) == len(values)
        assert sorted(v.type for v in each.values if v.kind == "weight") == sorted(
            str(v.type) for v in function.parameters.values()
        )
        assert len({v.name for v in each.values}) == len(each.values)


def test_a_weight_is_told_by_how_it_came() -> None:
    usable("tvm")
    found = explain_storage("gpt2", backend="tvm", target="x86-64-v4", **SMALL)
    block = {v.name: v for v in found.functions[0].values}
    assert block["ln_1.weight"].why == "the weight as provided"
    assert block["mlp.up.weight.panels"].why == "laid out by bind: mlp.up.weight"
    assert block["attn.projections.bias"].why.startswith("derived by bind: concat(attn.q.bias, ")
    assert block["mlp.up.weight.panels"].form == "panels(48)"
    main = str(found).partition("main: ")[2]
    assert "h.0.ln_1.weight" not in main and "weights that it only passes on" in main


def test_the_plan_is_the_last_row_of_one_table_and_a_stage_to_inspect() -> None:
    usable("tvm")
    settings = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    lines = report("compile", "gpt2", "--backend", "tvm", *settings).splitlines()
    wanted = [
        *(each.name for each in DEFAULT),
        "legalize",
        "decode-last",
        "read-blocks",
        "assign-layouts",
        "hoist-weights",
        "decode-where-read",
        "plan-storage",
    ]
    rows = [line.split()[0] for line in lines if line.strip()]
    assert [row for row in rows if row in wanted] == wanted
    shown = report("inspect", "gpt2", "--backend", "tvm", *settings, "--after", "plan-storage")
    assert "a view of linear" in shown and "graph gpt2" in shown
    facts = json.loads(report("inspect", "gpt2", "--backend", "tvm", *settings, "--after", "plan-storage", "--json"))
    assert {row["why"] for row in facts["plan"]["h"]} >= {"own storage", "a view of linear"}
    assert "plan" not in json.loads(
        report("inspect", "gpt2", "--backend", "tvm", *settings, "--after", "legalize", "--json")
    )
