"""A tour of a report in headless Chromium: each tab, search, folding, a link, the slider, themes, keys, paper.

    with browser() as chromium:
        tour(chromium, path)

`benchmarks/report.py` takes it through large models. Every step asserts that nothing was loaded and no error logged.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]

OVERLAPS = """() => {
    const siblings = new Map();
    for (const entry of app.view.flat) {
        const key = entry.parent ? entry.parent.key : "";
        if (!siblings.has(key)) siblings.set(key, []);
        siblings.get(key).push(entry);
    }
    const found = [];
    for (const [key, entries] of siblings) {
        for (let a = 0; a < entries.length; a++) for (let b = a + 1; b < entries.length; b++) {
            const [p, q] = [entries[a], entries[b]];
            const across = p.ax < q.ax + q.w - 0.5 && q.ax < p.ax + p.w - 0.5;
            if (across && p.ay < q.ay + q.h - 0.5 && q.ay < p.ay + p.h - 0.5) found.push([p.key, q.key]);
        }
        const outer = app.view.byKey.get(key);
        for (const entry of outer ? entries : []) {
            const right = entry.ax + entry.w > outer.ax + outer.w + 0.5;
            const below = entry.ay + entry.h > outer.ay + outer.h + 0.5;
            if (entry.ax < outer.ax || right || below) found.push([key, entry.key]);
        }
    }
    return found;
}"""
OPEN = """() => [app.view.single, ...app.view.flat.filter((e) => e.child).map((e) => e.key)]"""
PLACES = """() => Object.fromEntries(
    app.view.flat.filter((e) => !e.ghost && (e.op || e.kind === "in")).map((e) => [e.key, [e.ax, e.ay]])
)"""
MOVE = """() => {
    const range = document.getElementById("pass");
    range.value = %d;
    range.dispatchEvent(new Event("input"));
}"""


def needs_browser() -> str:
    """Return the path of Chromium; skip the test, with the name of what is missing, if it cannot run here."""
    pytest.importorskip("playwright")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs chromium")
    return path


@contextmanager
def browser() -> Iterator[Any]:
    """Start Chromium without a window."""
    path = needs_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


class Opened:
    """A report in a page of the browser, with everything that it logged and asked for."""

    def __init__(self, chromium: Any, path: Path, link: str = "", width: int = 1280, height: int = 800) -> None:
        self.path = path
        self.page = chromium.new_page(viewport={"width": width, "height": height})
        self.logged: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.logged.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.logged.append(f"error: {error}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(f"{path.as_uri()}{link}")
        self.page.wait_for_selector("html[data-ready]", timeout=60_000)

    def js(self, script: str) -> Any:
        return self.page.evaluate(script)

    def check(self) -> None:
        """Assert that the page logged no error and loaded only its own file."""
        assert self.logged == []
        assert {url.partition("#")[0] for url in self.requests} == {self.path.as_uri()}

    def tab(self, name: str) -> str:
        """Open a tab, and return its text."""
        self.page.click(f"#tab-{name}")
        self.page.wait_for_function(f"document.getElementById('body').getAttribute('aria-labelledby') === 'tab-{name}'")
        self.page.wait_for_timeout(60)
        return str(self.page.inner_text("#body"))

    def close(self) -> None:
        self.check()
        self.page.close()


def tour(chromium: Any, path: Path, *, accessible: bool = True) -> None:
    """Check every interactive feature of a report in Chromium."""
    opened = Opened(chromium, path)
    tabs(opened)
    folding(opened)
    slider(opened)
    search_and_link(chromium, opened)
    keyboard(opened)
    themes(opened, accessible)
    narrow(opened)
    paper(opened)
    opened.close()


def tabs(opened: Opened) -> None:
    for name in opened.js("app.tabs.map(([name]) => name)"):
        text = opened.tab(name)
        assert len(text) > 20, name
        section = opened.js(f"Data.held.get('{name}')") or {}
        assert opened.page.locator("#body .error").count() == ("error" in section), name
        if "command" in section:
            assert section["command"].split()[0] in text


def folding(opened: Opened) -> None:
    opened.page.click("#fit")
    if opened.js("app.isOpened()"):
        opened.page.click("#unfold")
    folded = opened.js("app.view.flat.length")
    opened.page.click("#unfold")
    assert opened.js("app.view.flat.length") >= folded
    for hold in (True, False):
        opened.page.set_checked("#hold", hold)
        assert opened.js(OVERLAPS) == []
    entry = "app.view.flat.find((e) => !e.op && e.child && e.key !== app.view.main)"
    if opened.js(f"Boolean({entry})"):
        below = f"(() => {{ const e = {entry}; app.view.toggle(e); return !app.view.byKey.get(e.key).child }})()"
        assert opened.js(below)


def slider(opened: Opened) -> None:
    """Step through all passes. Added ops are marked, and all others keep their place if no box opens or folds."""
    opened.js("app.view.all(true)")
    opened.page.set_checked("#hold", True)
    count = opened.js("app.model.passes.length")
    before: tuple[list[str], dict[str, Any]] | None = None
    compared = 0
    for stage in range(count):
        opened.js(MOVE % stage)
        assert opened.js("app.state.stage") == stage
        opened.js("app.view.drawAll()")
        places, state = opened.js(PLACES), opened.js(OPEN)
        if before and state == before[0]:
            same = {key for key in places if key in before[1]}
            assert same
            assert {key: places[key] for key in same} == {key: before[1][key] for key in same}
            compared += 1
        before = state, places
        opened.js("app.view.all(true)")
        opened.js("app.view.drawAll()")
        marked = opened.page.locator("#graph .item.added").count()
        added = opened.js(f"(app.model.passes[{stage}].added || []).length")
        assert bool(marked) == bool(added) or opened.js("app.view.flat.length") > 4000
        before = opened.js(OPEN), opened.js(PLACES)
    assert compared or count < 3
    assert opened.js(OVERLAPS) == []


def search_and_link(chromium: Any, opened: Opened) -> None:
    op = opened.js("app.model.light([...app.view.info.where.keys()].at(-1), app.state.stage).op")
    opened.page.keyboard.press("Escape")
    opened.page.fill("#query", op)
    assert opened.page.locator("#found li").count() >= 1
    opened.page.keyboard.press("ArrowDown")
    opened.page.keyboard.press("Enter")
    opened.page.wait_for_function("app.state.number !== null || app.state.item")
    link = opened.js("location.hash")
    assert link.startswith("#node=")
    number = opened.js("app.state.number")
    other = Opened(chromium, opened.path, link)
    other.page.wait_for_function(f"app.state.number === {number}")
    assert other.js("app.view.byKey.has(app.view.selected.key)")
    other.close()
    opened.page.fill("#query", "no such op at all")
    assert "no op" in opened.page.inner_text("#found")
    opened.page.fill("#query", "")


def keyboard(opened: Opened) -> None:
    """Reach and use everything without a pointer."""
    press = opened.page.keyboard.press
    opened.page.evaluate("document.activeElement.blur()")
    press("g")
    assert opened.js("document.activeElement === app.view.scroll")
    opened.js("(app.view.selected.key = null)")
    seen = set()
    for key in ["ArrowDown"] * 4 + ["ArrowUp", "ArrowRight", "ArrowLeft", "Enter", "ArrowDown", "Escape"]:
        press(key)
        opened.page.wait_for_timeout(10)
        seen.add(opened.js("app.view.selected.key"))
        assert opened.js("app.view.byKey.has(app.view.selected.key)")
    assert len(seen) >= 2
    assert opened.page.inner_text("#live")
    press("]")
    press("[")
    press("t")
    first = opened.js("app.state.tab")
    press("ArrowRight")
    assert opened.js("app.state.tab") != first
    assert opened.js("document.activeElement.id") == f"tab-{opened.js('app.state.tab')}"
    press("?")
    assert opened.js("document.getElementById('help').open")
    press("Escape")
    press("/")
    assert opened.js("document.activeElement.id") == "query"
    press("Escape")
    reached = set()
    opened.page.evaluate("document.activeElement.blur()")
    for _ in range(60):
        press("Tab")
        reached.add(opened.js("document.activeElement.id || document.activeElement.className"))
    assert {"query", "theme", "pass", "pass-name", "hold", "heat", "scroll", "divider", "body"} <= reached


def themes(opened: Opened, accessible: bool) -> None:
    shades = set()
    for scheme in ("light", "dark"):
        opened.page.emulate_media(color_scheme=scheme)
        opened.page.wait_for_timeout(200)  # the end of transitions
        shades.add(opened.js("getComputedStyle(document.body).backgroundColor"))
        for name in ("selected", "overview", "fusion", "memory") if accessible else ():
            opened.tab(name)
            assert serious_faults(opened.page) == []
    opened.page.click("#theme")
    shades.add(opened.js("getComputedStyle(document.body).backgroundColor"))
    assert len(shades) == 2
    opened.page.click("#theme")


def serious_faults(page: Any) -> list[str]:
    """Return the serious faults that axe finds."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{fault['id']}: {node['target']} {node['failureSummary']}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


def narrow(opened: Opened) -> None:
    opened.page.set_viewport_size({"width": 400, "height": 800})
    opened.page.wait_for_timeout(100)
    for name in opened.js("app.tabs.map(([name]) => name)"):
        opened.tab(name)
        assert opened.js("document.scrollingElement.scrollWidth") <= 400, name
    assert opened.page.locator("#graph .item").count() > 0
    opened.page.set_viewport_size({"width": 1280, "height": 800})


def paper(opened: Opened) -> None:
    opened.tab("selected")
    assert len(opened.page.pdf()) > 5_000
