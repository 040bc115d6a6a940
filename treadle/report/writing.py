"""The page: one HTML file with its style, its scripts and its data, which loads nothing else.

    text = page_text("bert", {"head": {...}, "fusion": {...}})

Each section of data is JSON, compressed with gzip, in base64. A damaged section does not affect the others. The page's
Content-Security-Policy allows no source: only the page's own scripts, identified by their hashes, may run, and these
can neither load nor send anything. Data is inserted into the page only as text.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

STYLE = "style.css"
SCRIPTS = ("text.js", "data.js", "sizes.js", "model.js", "graph.js", "charts.js", "details.js", "tabs.js", "main.js")
"""The parts of the page, in the order in which they run."""
LONGEST = 4_000
"""Limit on the characters of a text in the data. A longer text is truncated, and its length is added."""


def page_text(title: str, sections: Mapping[str, Any]) -> str:
    """Return the page with sections of data by name."""
    style = page_file(STYLE)
    scripts = [page_file(name) for name in SCRIPTS]
    policy = "; ".join(
        [
            "default-src 'none'",
            "script-src " + " ".join(map(_hash, scripts)),
            f"style-src {_hash(style)}",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    parts = {
        "policy": policy,
        "title": escape(title[:200]),
        "style": style,
        "data": "\n".join(
            f'<script type="application/octet-stream" data-section="{escape(name)}">{pack(data)}</script>'
            for name, data in sections.items()
        ),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    page = page_file("index.html")
    before, *rest = page.split("{{")
    found = [before]
    for part in rest:
        name, _, after = part.partition("}}")
        found += [parts[name], after]
    return "".join(found)


@cache
def page_file(name: str) -> str:
    """Return a part of the page."""
    return (files("treadle.report") / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def pack(data: Any) -> str:
    """Return data as compressed JSON in base64. The result depends only on the data."""
    text = json.dumps(plain(data), separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("ascii"), 6, mtime=0)).decode("ascii")


def plain(data: Any) -> Any:
    """Return data that JSON can express. Long texts are truncated, and NaN and infinite numbers become text."""
    if isinstance(data, str):
        return data if len(data) <= LONGEST else f"{data[:LONGEST]}... ({len(data):,} characters)"
    if data is None or isinstance(data, bool | int):
        return data
    if isinstance(data, float):
        return data if math.isfinite(data) else str(data)
    if isinstance(data, Mapping):
        return {plain(str(key)): plain(value) for key, value in data.items()}
    if isinstance(data, Sequence):
        if len(data) > 64 and all(type(each) is int for each in data):
            return data if isinstance(data, list) else list(data)
        return [plain(each) for each in data]
    return str(data)
