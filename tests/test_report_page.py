"""The report in a browser: a tour of small models, hostile names, damaged data. Skipped without Chromium."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import treadle as t
from tests.report_tour import Opened, browser, needs_browser, serious_faults, tour
from tests.test_report import HOSTILE, small, talking
from treadle.comparing.builds import open_build
from treadle.comparing.differences import compare
from treadle.report.building import Report, report_of
from treadle.report.comparison import comparison_report
from treadle.report.subjects import lowered_subject

TINY: dict[str, dict[str, Any]] = {
    "bert": {"layers": 2, "dim": 32, "heads": 2, "hidden": 64, "vocab": 100},
    "llama": {"layers": 3, "dim": 64, "heads": 4, "kv_heads": 2, "hidden": 128, "vocab": 256, "quantize": "int4"},
}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    needs_browser()
    with browser() as found:
        yield found


def sharded() -> Report:
    from treadle.explaining.sharding import explain_sharding

    plan = explain_sharding(small, mesh="tp=2", recipe="megatron")
    return report_of(lowered_subject(small), sharding=plan)


def gradient() -> Report:
    return t.Trainer("gpt2", layers=2, dim=32, heads=2, vocab=64).gradient.report()


@pytest.fixture(scope="module")
def mixing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a quantized model with an attention that is not fused."""
    path = tmp_path_factory.mktemp("mixing") / "mixing.html"
    return report_of(lowered_subject(talking, quantize="int8-weights")).save(path)


CASES: dict[str, Callable[[], Report]] = {
    **{name: lambda name=name: report_of(lowered_subject(name, **TINY[name])) for name in TINY},  # type: ignore[misc]
    "sharded": sharded,
    "gradient": gradient,
}


@pytest.mark.parametrize("case", CASES)
def test_a_tour(chromium: Any, tmp_path: Path, case: str) -> None:
    tour(chromium, CASES[case]().save(tmp_path / f"{case}.html"), accessible=case == "bert")


def test_errors_of_encodings_are_columns(chromium: Any, tmp_path: Path) -> None:
    sizes = TINY["llama"]
    plain = {name: size for name, size in sizes.items() if name != "quantize"}
    originals = dict(t.compile("llama", backend="numpy", **plain).weights)
    exe = t.compile("llama", backend="numpy", weights=originals, **sizes)
    opened = Opened(chromium, exe.report(originals=originals).save(tmp_path / "measured.html"))
    shown = opened.tab("weights")
    assert "largest error" in shown
    assert re.search(r"int4_groups.*[0-9.]+%.*[0-9.]+%", shown.replace("\n", " "))
    assert "relative to the root mean square" in shown
    opened.close()
    opened = Opened(chromium, exe.report().save(tmp_path / "unmeasured.html"))
    shown = opened.tab("weights")
    assert "largest error" not in shown
    assert "Errors of the encodings were not measured" in shown
    opened.close()


def test_two_builds_have_one_selection(chromium: Any, tmp_path: Path) -> None:
    sizes = {"layers": 2, "dim": 32, "heads": 2, "vocab": 64}
    builds = [
        open_build("gpt2", name=name, without=without, **sizes)
        for name, without in (("fused", ()), ("other", ("fuse-activated-linear",)))
    ]
    opened = Opened(chromium, comparison_report(compare(*builds)).save(tmp_path / "diff.html"))
    assert opened.js("[...document.querySelectorAll('.graphs h2')].map((each) => each.textContent)") == [
        "a: fused",
        "b: other",
    ]
    shown = opened.tab("diff")
    assert "fuse-activated-linear" in shown or "activated_linear" in shown
    pair = """app.pairs[0].size && [...app.pairs[0]].find(([number, others]) => others.length === 2)"""
    number, others = opened.js(pair)
    assert opened.js(f"app.model.light({number}, app.state.stage).op") == "activated_linear"
    opened.js(f"app.go({{ number: {number} }})")
    assert sorted(opened.js("[...app.other.selected.numbers]")) == sorted(others)
    assert opened.js("[...app.view.selected.numbers]") == [number]
    opened.js(f"app.other.options.onnode({others[1]})")
    assert opened.js("[...app.view.selected.numbers]") == [number], "a click in the other graph selects here, too"
    opened.js("app.setProgram(1)")
    opened.page.wait_for_function("document.querySelectorAll('.graphs h2')[0].textContent === 'b: other'")
    opened.js(f"app.go({{ number: {others[0]} }})")
    assert opened.js("[...app.other.selected.numbers]") == [number]
    opened.close()


def test_the_page_of_two_builds_is_narrow_and_accessible(chromium: Any, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"layers": 2, "dim": 32, "heads": 2, "vocab": 64}
    comparison = compare(open_build("gpt2", **sizes), open_build("gpt2", quantize="int8-weights", **sizes))
    opened = Opened(chromium, comparison_report(comparison).save(tmp_path / "diff.html"))
    for name in opened.js("app.tabs.map(([name]) => name)"):
        opened.tab(name)
    opened.tab("diff")
    assert serious_faults(opened.page) == []
    opened.page.set_viewport_size({"width": 400, "height": 800})
    for name in ("diff", "selected", "log"):
        opened.tab(name)
        assert opened.js("document.scrollingElement.scrollWidth") <= 400, name
    opened.close()


def test_an_op_of_one_build_alone_is_described(chromium: Any, tmp_path: Path) -> None:
    builds = [
        open_build("gpt2", name=name, layers=2, dim=32, heads=2, vocab=64, **more)
        for name, more in (("plain", {}), ("small", {"quantize": "int8-weights"}))
    ]
    opened = Opened(chromium, comparison_report(compare(*builds)).save(tmp_path / "diff.html"))
    (number, *_) = opened.js("Data.section('diff').then((found) => found.data.only[1])")
    opened.js(f"app.other.options.onnode({number})")
    opened.page.wait_for_function("document.getElementById('body').textContent.includes('is only in b: small')")
    assert opened.js("[...app.view.selected.numbers]") == []
    assert opened.js("[...app.other.selected.numbers]") == [number]
    opened.close()


def test_hostile_names_are_shown_as_text(chromium: Any, tmp_path: Path) -> None:
    @t.model
    def hostile(x: t.f32["B 4"]):
        for name in HOSTILE:
            with t.scope(name[:4000]):
                x = t.gelu(t.linear(x, 4, name=name))
        return {HOSTILE[0]: x}

    path = t.compile(hostile).report().save(tmp_path / "hostile.html")
    opened = Opened(chromium, path)
    opened.js("app.view.all(true)")
    opened.js("app.view.drawAll()")
    shown = opened.js("document.querySelector('#graph svg').textContent")
    assert "</script>" in shown
    for name in opened.js("app.tabs.map(([name]) => name)"):
        shown += opened.tab(name)
    assert "\\u{202e}gnp.exe" in shown
    assert "nul\\u{0}" in shown
    assert "characters)" in shown
    assert opened.js("document.querySelectorAll('img, iframe, #graph script, #body script').length") == 0
    assert "\u202e" not in opened.js("document.body.textContent")
    opened.page.fill("#query", "onerror")
    assert opened.page.locator("#found img").count() == 0
    opened.close()


def test_damaged_data_is_the_error_of_its_tab(chromium: Any, tmp_path: Path) -> None:
    text = t.compile(small).report().html()
    path = tmp_path / "damaged.html"
    path.write_text(re.sub(r'(data-section="(?:fusion|details:0)">.{60}).{8}', r"\1AAAAAAAA", text), encoding="utf-8")
    opened = Opened(chromium, path)
    assert "damaged" in opened.tab("fusion")
    assert "at the peak" in opened.tab("memory")
    opened.js("app.go({ number: [...app.view.info.where.keys()][0] })")
    opened.page.wait_for_selector("#body .error")
    assert "Results" in opened.page.inner_text("#body")
    opened.close()
    path.write_text(re.sub(r'(data-section="graph:0">.{60}).{8}', r"\1AAAAAAAA", text), encoding="utf-8")
    page = chromium.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector("#graph .error")
    page.click("#tab-fusion")
    page.wait_for_selector("#body .sites")
    page.close()


def test_a_link_to_nothing_and_a_damaged_link_open_the_report(chromium: Any, tmp_path: Path) -> None:
    path = t.compile(small).report().save(tmp_path / "small.html")
    for link in ("#node=no.such&pass=nothing", "#node=%E0%A4%A&tab=none", "#&&=", "#node=h.attn.q&pass=fuse-linear"):
        Opened(chromium, path, link).close()
    opened = Opened(chromium, path, "#node=h.mlp.up&pass=fuse-linear")
    assert "linear" in opened.page.inner_text("#body h2")
    assert opened.js("app.model.passes[app.state.stage].name") == "fuse-linear"
    opened.close()


def test_a_click_on_a_value_marks_all_its_readers(chromium: Any, tmp_path: Path) -> None:
    opened = Opened(chromium, t.compile(small).report().save(tmp_path / "small.html"))
    opened.js("app.view.all(true)")
    value, readers = opened.js(
        "[...app.model.values(app.state.stage)].map(([key, v]) => [key, v.readers.length])"
        ".sort((a, b) => b[1] - a[1])[0]"
    )
    assert readers > 1
    opened.js(f"app.pickValue({value!r})")
    opened.js("app.view.drawAll()")
    assert opened.page.locator(".edge.value").count() >= readers
    assert f"{readers} readers" in opened.page.inner_text("#body")
    opened.close()


def test_sizes_of_the_memory_tab_change_its_peak(chromium: Any, tmp_path: Path) -> None:
    from treadle.explaining.memory import explain_memory

    opened = Opened(chromium, t.compile(small).report().save(tmp_path / "small.html"))
    opened.tab("memory")
    opened.page.fill("input[aria-label='Size of S']", "300")
    opened.page.keyboard.press("Tab")
    peak = explain_memory(small, sizes={"S": 300}).peak
    assert f"({peak:,} bytes) at the peak at B=1, S=300" in opened.page.inner_text("#body .big")
    opened.close()


def test_a_frame_of_a_notebook_shows_the_report(chromium: Any, tmp_path: Path) -> None:
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><body>{t.compile(small).report()._repr_html_()}", encoding="utf-8")
    page = chromium.new_page()
    logged: list[str] = []
    page.on("console", lambda message: logged.append(message.text))
    page.on("pageerror", lambda error: logged.append(str(error)))
    page.goto(path.as_uri())
    frame = page.frame_locator("iframe")
    frame.locator("#graph .item").first.wait_for()
    frame.locator("#tab-memory").click()
    frame.locator("#body .chart").wait_for()
    assert logged == []
    page.close()


PLACE = """(number) => {
    const entry = app.view.flat.find((e) => e.op && e.op.number === number);
    const view = app.view.view();
    const x = entry.ax + app.view.left;
    const across = x >= view.x - 1 && x + entry.w <= view.x + view.w + 1;
    return across && entry.ay >= view.y - 1 && entry.ay + entry.h <= view.y + view.h + 1;
}"""


def button(opened: Opened, text: str) -> Any:
    return opened.page.locator("#body button", has_text=text).first


def test_the_fusion_tab_leads_to_the_fused_op_and_to_the_op_that_stopped_a_match(chromium: Any, mixing: Path) -> None:
    opened = Opened(chromium, mixing)
    opened.tab("fusion")
    for op, name in (
        ("projections", "merge-projections"),
        ("add_layer_norm", "fuse-residual-norm"),
        ("activated_linear", "fuse-activated-linear"),
    ):
        button(opened, f"Show the {op}").click()
        assert opened.js("app.model.passes[app.state.stage].name") == name
        (number,) = opened.js("[...app.view.selected.numbers]")
        assert opened.js(f"app.model.light({number}, app.state.stage).op") == op
        assert opened.js("[...app.view.info.added]").count(number) == 1
        assert opened.js(f"({PLACE})({number})")
    assert "sums over h, not over t" in opened.page.inner_text("#body")
    button(opened, "Show its 4 ops").click()
    assert opened.page.locator("#graph .item.stopped").count() == 1
    assert opened.page.locator("#graph .item.marked").count() >= 4
    opened.page.click("#back")
    assert opened.js("app.state.stage === app.model.passes.length - 1")
    assert opened.page.locator("#back").is_hidden()
    opened.close()


def test_a_link_enlarges_the_graph_until_the_op_can_be_read(chromium: Any, mixing: Path) -> None:
    opened = Opened(chromium, mixing)
    number = opened.js("app.search('attention')[0].number")
    last = opened.js("[...app.model.at(3).where.keys()].at(-1)")
    for go in (f"app.go({{ number: {number} }})", "app.takeFound(0)", f"app.go({{ number: {last}, stage: 3 }})"):
        opened.js("app.view.all(true)")
        opened.js("app.showFound(app.search('attention'))")
        opened.page.click("#fit")
        view = opened.js("[app.view.height * app.view.scale, app.view.scroll.clientHeight]")
        assert view[0] <= view[1] + 1, "the whole graph fits"
        assert opened.js("app.view.scale < GraphView.READABLE")
        opened.js(go)
        assert opened.js("app.view.scale >= GraphView.READABLE")
        assert opened.js(f"({PLACE})(app.state.number)")
    opened.close()


@pytest.mark.parametrize("width", [400, 1240, 1440])
def test_no_table_is_cut_off(chromium: Any, mixing: Path, width: int) -> None:
    opened = Opened(chromium, mixing, width=width, height=900)
    cut = "[...document.querySelectorAll('#body .table')].filter((e) => e.scrollWidth > e.clientWidth + 1)"
    for name in opened.js("app.tabs.map(([name]) => name)"):
        opened.tab(name)
        assert opened.js(f"{cut}.map((e) => e.getAttribute('aria-label'))") == [], name
    opened.close()


def test_a_narrow_page_scrolls_to_the_graph_and_to_the_start_of_a_tab(chromium: Any, mixing: Path) -> None:
    opened = Opened(chromium, mixing, width=400)
    opened.tab("fusion")
    opened.js("window.scrollTo(0, 3000)")
    top = "document.getElementById('%s').getBoundingClientRect().top"
    assert opened.js(top % "graph") < -400
    opened.js("[...document.querySelectorAll('.site button')].find((e) => /^Show its 4/.test(e.textContent)).click()")
    assert -1 <= opened.js(top % "graph") < 400
    opened.tab("costs")
    opened.js("window.scrollTo(0, 3000)")
    opened.tab("weights")
    assert opened.js(top % "panel") >= -1
    opened.close()


def test_bars_of_boxes_and_ops_are_shares_of_a_run(chromium: Any, tmp_path: Path) -> None:
    """A repeated block counts with all its calls, in its own ops, too."""
    opened = Opened(chromium, report_of(lowered_subject(small)).save(tmp_path / "small.html"))
    last = "app.model.passes.length - 1"
    for name, unit in (("flops", 1), ("bytes", 2)):
        total, boxes = opened.js(
            f"(() => {{ const c = app.model.costs({last}, '{name}'); return [c.total, [...c.boxes]] }})()"
        )
        section = opened.js("Data.section('costs').then((found) => found.data)")
        assert total == section[name] == sum(row[unit] for row in section["ops"])
        held = dict(boxes)
        (call,) = opened.js("app.view.flat.filter((e) => e.kind === 'call').map((e) => e.item.number)")
        assert opened.js(f"app.model.costs({last}, '{name}').items.get({call})") == held["h"]
    shown = opened.tab("costs")
    assert "Which ops cost the most?" in opened.tab("overview")
    assert re.search(r"attention\s+attn\s.*%.*%\s+3\s", shown)
    opened.close()


def test_sizes_stay_when_another_tab_is_opened(chromium: Any, mixing: Path) -> None:
    opened = Opened(chromium, mixing)
    opened.tab("memory")
    colors = "[...document.querySelectorAll('.legend li')].map((e) => e.textContent)"
    before = opened.js(colors)
    opened.page.fill("input[aria-label='Size of S']", "300")
    opened.page.keyboard.press("Tab")
    assert opened.js(colors) == before
    opened.tab("log")
    assert "S=300" in opened.tab("memory")
    opened.close()


def test_an_op_shows_the_whole_chain_of_passes_that_led_to_it(chromium: Any, mixing: Path) -> None:
    opened = Opened(chromium, mixing)
    number = opened.js("app.search('linear').find((e) => e.scope.endsWith('activated_linear')).number")
    opened.js(f"app.go({{ number: {number} }})")
    opened.page.wait_for_selector("#body .history")
    shown = opened.page.inner_text("#body .history")
    assert "quantize-weights changed" in shown
    assert re.search(r"fuse-activated-linear made activated_linear.* from .*linear", shown)
    assert re.search(r"legalize made it from activated_linear", shown)
    opened.close()


def test_keys_work_unless_text_is_typed(chromium: Any, mixing: Path) -> None:
    opened = Opened(chromium, mixing)
    opened.page.focus("#hold")
    opened.page.keyboard.press("/")
    assert opened.js("document.activeElement.id") == "query"
    opened.page.keyboard.type("linear/")
    assert opened.page.input_value("#query") == "linear/"
    opened.page.fill("#query", "softmax")
    assert "after pass" in opened.page.inner_text("#found")
    opened.close()
