"""`treadle diff`: planted regressions, matching, conditions, the command, and hostile names."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.command_line import SMALL, Treadle, commands_in, refused
from tests.planted_regressions import PLANTED, Planted, decoder, kept_gelu, spelled_attention
from tests.random_programs import random_program
from tests.test_models import ZOO
from treadle.comparing.builds import open_build
from treadle.comparing.conditions import check_conditions, parse_conditions
from treadle.comparing.differences import QUANTITIES, compare
from treadle.comparing.folded_names import fold_names
from treadle.comparing.matching import Matching, match_builds
from treadle.entry_functions import compile
from treadle.explaining.fusion import explain_fusion
from treadle.ir.builder import Builder
from treadle.ir.errors import TreadleError, UsageError
from treadle.ir.graph import Graph
from treadle.ir.op_registry import OPS
from treadle.ir.text.parser import parse_graph
from treadle.passes.cleanup.decompose import Decompose
from treadle.passes.framework.manager import PassManager

FAMILIES = [name for name in ZOO if " " not in name]
HOSTILE = ("</script>", '"\\"', "a\0b", "\u202egnp", "x" * 1_000_000, "a." * 300_000, "\ud800", "\x1b[31m")


@pytest.fixture
def treadle_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Treadle:
    return commands_in(tmp_path, capsys, monkeypatch)


# -- planted regressions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", PLANTED, ids=[each.name for each in PLANTED])
def test_a_planted_regression_is_found(planted: Planted) -> None:
    if planted.needs:
        pytest.importorskip(planted.needs)
    found = planted.compared()
    assert planted.found(found), str(found)
    assert found.differs and found.is_related
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize("planted", PLANTED, ids=[each.name for each in PLANTED])
def test_a_build_without_the_regression_has_none(planted: Planted) -> None:
    """The check of a case is false for two equal builds, so that it finds the regression and nothing else."""
    if planted.needs:
        pytest.importorskip(planted.needs)
    same = compare(open_build(planted.model, **planted.a), open_build(planted.model, **planted.a))
    assert not planted.found(same)
    assert not same.differs, str(same)
    assert len(str(same).splitlines()) == 1 and "no difference" in str(same)


@pytest.mark.parametrize("renamed", ["x", "y"])
def test_ports_with_other_names_are_a_difference(renamed: str) -> None:
    text = "graph g {\n  symbols B\n  main(x: f32[B, 4]) -> (y: f32[B, 4]) {\n    h = tanh(x)\n    return y = h\n  }\n}"
    other = text.replace(f"{renamed}:", "z:").replace("return y", f"return {'z' if renamed == 'y' else 'y'}")
    other = other.replace("tanh(x)", "tanh(z)") if renamed == "x" else other
    found = compare(*[open_build(parse_graph(each), backend="numpy") for each in (text, other)])
    kind = "input" if renamed == "x" else "output"
    assert found.differs
    assert found.ports == ([f"{kind} {renamed}: f32[B, 4]"], [f"{kind} z: f32[B, 4]"])
    assert f"inputs and outputs of b only\n  {kind} z: f32[B, 4]" in str(found)


def test_reasons_name_what_prevents_a_fusion() -> None:
    found = compare(open_build(spelled_attention), open_build(spelled_attention, bad=True))
    (lost,) = found.lost
    assert lost.op == "attention" and lost.scopes == ("h.0.attn", "h.1.attn", "h.2.attn")
    assert "planted_regressions.py" in lost.lines[0]
    assert lost.reason
    assert lost.reason in str(found)


# -- matching ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_builds_of_the_zoo_do_not_differ(name: str) -> None:
    graph = ZOO[name][0].graph()
    found = compare(open_build(graph), open_build(graph))
    assert not found.differs, str(found)
    assert all(len(m.a) == len(m.b) == 1 and m.a[0].number == m.b[0].number for m in found.matching.matches)


@pytest.mark.parametrize("seed", range(12))
def test_random_programs_are_matched_with_themselves_and_decomposed(seed: int) -> None:
    graph = random_program(seed)
    assert not compare(open_build(graph), open_build(graph)).differs
    decomposed = PassManager([Decompose()]).run(graph).graph
    found = compare(open_build(graph), open_build(decomposed))
    assert str(found)
    check_complete(found.matching)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_layer_is_one_added_layer_wherever_it_is(at: int) -> None:
    """Layers with different ops: the added one is the one that differs from all, and the others correspond."""

    def build(kinds: list[str]) -> Graph:
        b = Builder(Graph("g"))
        x = b.input("x", "f32[B, 8]")
        for number, kind in enumerate(kinds):
            with b.scoped(f"h.{number}"):
                x = getattr(b, kind)(b.linear(x, b.parameter("w", "f32[8, 8]")))
        b.function.outputs["y"] = x.value
        return b.graph

    kinds = ["tanh", "exp", "tanh"]
    found = compare(open_build(build(kinds)), open_build(build([*kinds[:at], "abs", *kinds[at:]])))
    assert [(g.scope, g.is_layer) for g in found.added] == [(f"h.{at}", True)]
    assert found.removed == () and found.changes == ()
    assert found.quantity("added").b == 2
    back = compare(found.b, found.a)
    assert [(g.scope, g.is_layer) for g in back.removed] == [(f"h.{at}", True)]
    assert back.added == () and back.changes == ()


def test_very_long_stacks_are_paired_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best pairing takes time in the product of the lengths, so it has a limit."""
    monkeypatch.setattr("treadle.comparing.scope_alignment._MOST_PAIRS", 0)
    found = compare(open_build(decoder, layers=2, relu_at=0), open_build(decoder, layers=4, relu_at=0))
    assert [g.scope for g in found.added if g.is_layer] == ["h.2", "h.3"]


def test_without_lineage_a_fusion_is_one_match(tmp_path: Path) -> None:
    """Artifacts have no lineage: fused and unfused ops of a scope are matched by the scope."""
    paths = [tmp_path / "a.treadle", tmp_path / "b.treadle"]
    compile(spelled_attention).save(paths[0])
    compile(spelled_attention, passes=()).save(paths[1])
    found = compare(*map(open_build, paths))
    assert {each.op: len(each.scopes) for each in found.lost} == {"attention": 3, "projections": 3}
    assert found.quantity("attention").b == 0
    assert {m.by for m in found.matching.matches} <= {"exact", "hash", "scope", "layer", "group"}
    same = compare(open_build(paths[0]), open_build(spelled_attention))
    assert not same.differs, str(same)


def check_complete(matching: Matching) -> None:
    """Check that every node of both sides is in one match, or is listed as added or removed."""
    for side, run, alone in (("a", matching.a, matching.removed), ("b", matching.b, matching.added)):
        listed = Counter(node for m in matching.matches for node in getattr(m, side)) + Counter(alone)
        assert listed == Counter(run.nodes)


def test_every_node_is_matched_or_listed() -> None:
    for a, b in (("gpt2", "gpt2@fuse-linear"), ("gpt2", "bert"), ("llama@legalize", "llama")):
        _, matching = match_builds(*(open_build(each, layers=2) for each in (a, b)))
        check_complete(matching)


@pytest.mark.parametrize("scheme", ["int8-weights", "int4-int8"])
def test_quantization_keeps_the_lineage(scheme: str) -> None:
    """So that a site that no rule fused is not reported as removed, and every op has a partner."""
    found = compare(open_build(decoder), open_build(decoder, quantize=scheme))
    assert {m.by for m in found.matching.matches} == {"lineage"}
    assert found.removed == () and found.lost == ()
    assert {op for group in found.added for op in group.ops} <= {"decode", "encode"}
    explained = explain_fusion(spelled_attention, quantize="int8-weights", passes=())
    missed = {v.reason for block in explained.blocks for v in block.verdicts if v.kind == "attention"}
    assert missed == {"the pipeline has no fuse-attention"}
    partly = explain_fusion(kept_gelu, quantize="int8-weights", bad=True)
    assert not any("other passes removed it" in v.reason for block in partly.blocks for v in block.verdicts)


def test_a_pass_of_the_backend_is_a_build() -> None:
    lowered = compare(open_build("gpt2", layers=2), open_build("gpt2@legalize", layers=2))
    assert lowered.lost == () and any(c.what.startswith("projections -> ") for c in lowered.changes)
    found = compare(open_build("gpt2@legalize", layers=2), open_build("gpt2@hoist-weights", layers=2))
    assert found.quantity("peak").b is None
    assert not compare(found.b, open_build("gpt2@plan-storage", layers=2)).differs  # its peak is known
    with pytest.raises(UsageError, match="peak is not known"):
        check_conditions(parse_conditions("peak>1x"), found)


def test_models_with_nothing_in_common_are_one_line() -> None:
    found = compare(open_build("gpt2", layers=1), open_build("vit", layers=1))
    assert not found.is_related
    assert str(found) == "gpt2(layers=1) and vit(layers=1) have nothing in common: " + (
        "no op of one corresponds to an op of the other"
    )
    json.dumps(found.as_dict(), allow_nan=False)


def test_sizes_are_within_the_bounds_of_both() -> None:
    a, b = open_build("gpt2", layers=1, context=64), open_build("gpt2", layers=1, context=16)
    assert compare(a, b).sizes["S"] == 16
    with pytest.raises(UsageError, match="the size of S cannot be 32"):
        compare(a, b, sizes={"S": 32})
    with pytest.raises(UsageError, match="neither model has a symbolic axis Q"):
        compare(a, b, sizes={"Q": 32})


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_escaped(hostile: str) -> None:
    def build(width: int) -> Graph:
        b = Builder(Graph(hostile))
        x = b.input("x", "f32[B, 8]")
        with b.scoped(hostile):
            y = b.linear(x, b.parameter(hostile, f"f32[{width}, 8]"))
        b.function.outputs["y"] = b.reduce_sum(y, axes=(1,)).value
        return b.graph

    for found in (compare(open_build(build(8)), open_build(build(n))) for n in (8, 9)):
        text = str(found)
        assert all(c.isprintable() for line in text.split("\n") for c in line)
        assert len(text) < 20_000
        json.loads(json.dumps(found.as_dict(), allow_nan=False))


def test_names_are_folded() -> None:
    assert fold_names(["h.0.a", "h.1.a", "h.3.a", "", "ln_f", "h.0.a"]) == ["h.{0..1,3}.a", "ln_f"]


# -- conditions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("attention<12", True),
        ("attention<2", False),
        ("attention=2", True),
        ("attention != 2", False),
        ("flops>1.01x", True),
        ("flops < 1x", False),
        ("peak>=1x", True),
        ("weights>1.5kB", True),
        ("weights<=1MiB", True),
        ("flops>1G", False),
        ("gelu>0", True),  # inside activated_linear
        ("lost>0", False),
        ("added>0", True),
        ("bits=32", True),
    ],
)
def test_conditions_compare_the_second_build(text: str, holds: bool) -> None:
    found = compare(open_build(decoder, layers=1), open_build(decoder, layers=2))
    (outcome,) = check_conditions(parse_conditions(text), found)
    assert outcome.holds is holds, str(outcome)
    assert outcome.condition.text == text
    assert ("HOLDS" in str(outcome)) is holds


def test_an_op_inside_a_larger_fused_op_is_not_lost() -> None:
    """A norm that becomes the norm of a sum; and back, the sum is what is lost."""

    def build(*, summed: bool) -> Graph:
        b = Builder(Graph("g"))
        x, y = b.input("x", "f32[B, 8]"), b.parameter("w", "f32[8, 8]")
        with b.scoped("h.0"):
            z = b.linear(x, y)
            z = z + x if summed else b.exp(z)
            b.function.outputs["sum"] = z.value
            b.function.outputs["y"] = b.layer_norm(z, b.parameter("n", "f32[8]"), b.parameter("m", "f32[8]")).value
        return b.graph

    plain, summed = open_build(build(summed=False)), open_build(build(summed=True))
    assert summed.graph.main.nodes[-1].op.name == "add_layer_norm"
    assert compare(plain, summed).lost == ()
    assert [each.op for each in compare(summed, plain).lost] in ([], ["add_layer_norm"])


def test_kernels_are_counted() -> None:
    pytest.importorskip("tvm")
    found = compare(*(open_build(decoder, backend="tvm", layers=n) for n in (1, 2)))
    more = {name: b - a for name, (a, b) in found.kernels.items() if a != b}
    q = found.quantity("kernels")
    assert q.a is not None and q.b is not None and sum(more.values()) == q.b - q.a > 0
    assert all(f"{count:+d} {name}" in str(found) for name, count in more.items())


def test_ratios_are_exact() -> None:
    """1.1 in binary is more than 1.1: a ratio of exactly 11/10 is not more than 1.1x."""
    from treadle.comparing.differences import Quantity

    (condition,) = parse_conditions("bytes>1.1x")
    assert not condition.holds(Quantity("bytes", 10**18, 11 * 10**17))
    assert condition.holds(Quantity("bytes", 10**18, 11 * 10**17 + 1))


@pytest.mark.parametrize(
    ("text", "at", "what"),
    [
        ("", 1, "expected a quantity"),
        ("peak", 5, "expected a comparison"),
        ("peak>", 6, "expected a number"),
        ("peak>1y", 7, "unknown unit y"),
        ("flops>3MB", 8, "unknown unit MB"),
        ("peak>1,", 8, "expected a quantity"),
        ("peak>1 flops>2", 8, 'expected "," or the end'),
        ("attenton<3", 1, "unknown quantity attenton"),
        ("peak>1, peek>2", 9, "unknown quantity peek"),
        ("lost>1x", 7, "lost counts differences"),
        ("\0", 1, "expected a quantity"),
        ("peak>" + "9" * 100_000, 0, "the conditions are too long"),
    ],
)
def test_a_mistake_has_its_position(text: str, at: int, what: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_conditions(text)
    assert what in raised.value.what
    assert (f"at character {at}" in raised.value.what) is (at > 0)
    if at:
        assert (raised.value.received or "").split("\n")[1] == " " * (at - 1) + "^"
    if "unknown quantity" in what:
        assert ("attention" if at == 1 else "peak") in (raised.value.hint or "")


def test_a_quantity_that_is_similar_to_none_lists_them() -> None:
    with pytest.raises(UsageError, match="unknown quantity speed") as raised:
        parse_conditions("speed>1.0x")
    assert str(raised.value.hint).startswith("one of ops, added, ")


def test_quantities_and_ops_have_different_names() -> None:
    assert not set(QUANTITIES) & set(OPS)


# -- the command ---------------------------------------------------------------------------------------------------


def test_equal_builds_are_one_line(treadle_command: Treadle) -> None:
    said = treadle_command("diff", SMALL, SMALL, "--fail-if", "added>0, removed>0, peak>1x")
    assert said.code == 0
    assert said.out.splitlines()[0].startswith(f"no difference between {SMALL} and {SMALL}: ")


def test_a_condition_that_holds_exits_with_1(treadle_command: Treadle) -> None:
    words = ("diff", SMALL, "--b", "--set act=t.relu --set layers=3")
    assert treadle_command(*words, "--fail-if", "gelu<2, attention<1").code == 1
    assert treadle_command(*words, "--fail-if", "attention<3").code == 0
    said = treadle_command(*words, "--fail-if", "gelu<2", "--json")
    assert said.code == 1
    assert [each["holds"] for each in said.json["conditions"]] == [True]
    assert said.json["b"]["name"] == f"{SMALL} --set act=t.relu --set layers=3"
    assert [each["scope"] for each in said.json["added"] if each.get("layer")] == ["h.2"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--fail-if", "atention<1"), "did you mean attention"),
        (("--fail-if", "attention<"), "expected a number at character 11"),
        (("--b", "--quantise int8"), "--b: No such option: --quantise"),
        (("--b", "--help"), "--b: No such option: --help"),
        (("--a", "'"), "--a must be options"),
        (("--b", "--set layers"), "an option must be NAME=VALUE"),
        (("--b", "--quantize int9"), "unknown quantization scheme"),
        (("--sizes", "Q=1"), "neither model has a symbolic axis Q"),
        ((f"{SMALL}@fuse-gellu",), "did you mean fuse-gelu"),
        ((f"{SMALL}@",), "a build is MODEL or MODEL@PASS"),
        (("no.treadle",), "no.treadle"),
        (("--fail-if", "kernels>1"), "kernels is not known in both builds"),
    ],
)
def test_bad_input_exits_with_2(treadle_command: Treadle, words: tuple[str, ...], part: str) -> None:
    refused(treadle_command("diff", SMALL, *words), part)


@pytest.mark.parametrize("quantity", ["peak>1x", "kernels>100", "generic>100"])
def test_a_build_without_a_plan_of_storage_is_completed_as_the_hint_says(
    quantity: str, treadle_command: Treadle
) -> None:
    pytest.importorskip("tvm")
    words = "diff", SMALL, "--backend", "tvm", "--fail-if", quantity
    said = treadle_command(*words[:2], f"{SMALL}@legalize", *words[2:])
    refused(said, "is not known in both builds", "leave out @legalize")
    assert treadle_command(*words[:2], SMALL, *words[2:]).code == 0


def test_a_build_without_a_pass_is_the_model(treadle_command: Treadle) -> None:
    refused(treadle_command("diff", SMALL, f"{SMALL}@"), f"try       {SMALL}, or {SMALL}@PASS")
    refused(treadle_command("diff", SMALL, "@fuse-gelu"), "try       MODEL, or MODEL@PASS")
    assert treadle_command("diff", SMALL, SMALL).code == 0


def test_options_of_a_side_come_after_the_common_ones(treadle_command: Treadle) -> None:
    said = treadle_command("diff", SMALL, "--set", "layers=3", "--a", "--set layers=1", "--json")
    assert {op: n for op, n in said.json["ops"].items() if op == "attention"} == {"attention": {"a": 1, "b": 3}}
    same = treadle_command("diff", SMALL, "--set", "layers=3", "--quantize", "int8-weights", "--json").json
    assert not same["differs"] and same["quantities"]["bits"]["b"] < 32


def test_help_prints_the_grammar(treadle_command: Treadle) -> None:
    text = " ".join(treadle_command("diff", "--help").out.split())
    for part in ("QUANTITY SIGN NUMBER", "<, <=, >, >=, = or !=", "x for that multiple", *QUANTITIES):
        assert part in text


def test_an_artifact_refuses_options_and_passes(treadle_command: Treadle) -> None:
    assert treadle_command("compile", SMALL, "-o", "small.treadle").code == 0
    assert treadle_command("diff", "small.treadle", SMALL).out.startswith("no difference")
    assert (
        treadle_command("compile", SMALL, "--set", "layers=1", "--quantize", "int8-weights", "-o", "one.treadle").code
        == 0
    )
    for sides in (("one.treadle", SMALL), (SMALL, "one.treadle")):
        said = treadle_command("diff", *sides, "--set", "layers=1", "--quantize", "int8-weights")
        assert said.out.startswith("no difference")
    refused(treadle_command("diff", "one.treadle", "small.treadle", "--set", "layers=1"), "does not accept --set")
    refused(treadle_command("diff", "small.treadle", "--b", "--quantize int4"), "an artifact is already compiled")
    refused(treadle_command("diff", "small.treadle@fuse-gelu", SMALL), "only the graph after its last pass")


def test_errors_of_a_model_are_treadle_errors() -> None:
    with pytest.raises(TreadleError):
        open_build("no-such-model")


def test_an_option_of_both_builds_is_in_the_name_of_the_one_that_keeps_it(treadle_command: Treadle) -> None:
    said = treadle_command("diff", SMALL, "--quantize", "int8", "--b", "--quantize int8-weights")
    names = [line.rpartition(", ")[0] for line in said.out.splitlines()[:2]]
    assert names == [f"a  {SMALL} --quantize int8", f"b  {SMALL} --quantize int8-weights"]
