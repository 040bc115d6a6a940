"""A store of certificates of rewrites that were tried before, in the user's cache next to the kernels. Its keys are the
texts of the claims.

A certificate is a function of the two sides of a claim, which its key holds as text, of the seed, and of the code that
evaluates them: the ops' meanings, the interpreter, and the certificates' own code. So the name of a store is a hash of
that code's sources and of NumPy's version: if any of it changes, everything is tried again. If rewrites, passes or
models change, their claims have another text and are tried. The processes of a run share the store.

Some certificates are not stored, because a test may change the meaning that the sources define: claims with a test's
own ops, terms or references, claims that are tried after a test has emptied the memory of certificates, and claims in
the tests of certificates.

If TREADLE_CACHE is an empty folder, every rewrite is tried.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from treadle.files.errors import UsageError
from treadle.files.user_cache import cache_folder, mark_used
from treadle.ir.graph import Graph
from treadle.passes.certificates import certifying
from treadle.passes.certificates.certificate import Certificate, Counterexample
from treadle.passes.certificates.certifying import Trial

Found = Certificate | Counterexample

ROOT = Path(__file__).parents[1]
EVALUATES = ("ir", "passes/certificates")
"""Folders whose code decides the verdict on a claim."""
UNUSED = 7 * 24 * 3600
"""Seconds after which the unused store of other sources is deleted. One week."""


def version() -> str:
    """Return a hash of everything except the claim that decides the verdict on it."""
    digest = hashlib.sha256(f"{sys.version} {np.__version__}".encode())
    for folder in EVALUATES:
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


class Store:
    """Certificates and counterexamples by their keys, in a file that several processes read and write.

    A file that cannot be read or written counts as empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[tuple[int, int], sqlite3.Connection] = {}
        with suppress(sqlite3.Error, OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file.execute("create table if not exists found (key text primary key, said text)")

    @property
    def _file(self) -> sqlite3.Connection:
        """Return this thread's connection to the file. Another thread or a forked process must open its own."""
        owner = os.getpid(), threading.get_ident()
        if owner not in self._files:
            file = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            file.execute("pragma synchronous = off")
            self._files[owner] = file
        return self._files[owner]

    def get(self, key: str) -> Found | None:
        with suppress(sqlite3.Error, ValueError, KeyError, TypeError):
            row = self._file.execute("select said from found where key = ?", (key,)).fetchone()
            if row is not None:
                return read(row[0])
        return None

    def keep(self, key: str, found: Found) -> None:
        with suppress(sqlite3.Error):
            self._file.execute("insert or replace into found values (?, ?)", (key, written(found)))


def written(found: Found) -> str:
    """Return a result as text that `read` accepts."""
    if isinstance(found, Certificate):
        return json.dumps({"certificate": found.as_dict()})
    return json.dumps({"counterexample": asdict(found)})


def read(text: str) -> Found:
    said = json.loads(text)
    if "certificate" in said:
        return Certificate.read(said["certificate"])
    given = said["counterexample"]
    return Counterexample(**given | {"sizes": tuple((str(s), int(n)) for s, n in given["sizes"])})


def is_ours(sides: tuple[Graph, Graph]) -> bool:
    """Return True if an op, all ops nested in it, and their meanings are defined in the hashed sources."""
    return all(_are_ours(node.op) for side in sides for _, node in side.walk())


def _are_ours(op: Any) -> bool:
    functions = (op.reference, getattr(op, "body", None))
    modules = [function.__module__ for function in functions if function is not None]
    modules += [type(each).__module__ for each in (op, *_parts(list(op.attributes.values())))]
    return all(name == "builtins" or name.startswith(("treadle.ir.", "numpy")) for name in modules)


def _parts(values: list[Any]) -> Iterator[Any]:
    for value in values:
        yield value
        if isinstance(value, tuple | frozenset | list):
            yield from _parts(list(value))
        elif isinstance(value, dict):
            yield from _parts([*value.keys(), *value.values()])


def remember() -> None:
    """Let this process look up certificates before it tries claims, and store the new ones."""
    try:
        folder = cache_folder() / "certificates"
    except UsageError:
        return
    with suppress(OSError):
        for other in folder.glob("*.sqlite"):
            if other.stat().st_mtime < time.time() - UNUSED:
                other.unlink()
    store, tried, known = Store(folder / f"{version()}.sqlite"), Trial.run_shrunk, certifying._known
    mark_used(store.path)

    def looked_up(trial: Trial, claim: Any, region: Any, sides: tuple[Graph, Graph], *others: Any) -> Found:
        report = "certificate" not in os.environ.get("PYTEST_CURRENT_TEST", "") and certifying._known is known
        if not (report and is_ours(sides)):
            return tried(trial, claim, region, sides, *others)
        found = store.get(trial.key)
        if found is None:
            found = tried(trial, claim, region, sides, *others)
            store.keep(trial.key, found)
        return found

    Trial.run_shrunk = looked_up  # type: ignore[method-assign]
