"""A check that texts and names keep to plain English: counts by folder, which may only fall.

    python -m tests.plain_english                # compare with the allowed counts; exit status 1 if one is exceeded
    python -m tests.plain_english --list words   # print every place that counts as one kind
    python -m tests.plain_english --lower        # lower the allowed counts to this tree's counts

Seven kinds are counted, each in every folder:

    openings      docstrings whose first word is What, Whether, How, Which, Where, Of or By
    pages         private words in README, CHANGELOG and docs (without docs/decisions)
    messages      private words in strings of the product: errors, hints, help texts, output
    public        private words in docstrings of public names of the product
    elsewhere     private words in all other docstrings, in comments, in strings of tests and in docs/decisions
    identifiers   private words as parts of identifiers, each definition is counted once
    participles   bare participles as parameters, fields and public names

The private words and the words that replace them are in `PRIVATE_WORDS`. Words with an honest second use (term, order,
place, cut, lie) are not counted. The allowed counts are in tests/plain_english.json. A docstring that begins with
"Whether" is always an error.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("backends", "files", "frontends", "ir", "models", "passes", "runtime", "treadle")
FOLDERS = (*PRODUCT, "benchmarks", "tests")
ALLOWED = ROOT / "tests" / "plain_english.json"
OWN_FILES = ("tests/plain_english.py", "tests/test_plain_english.py")
"""Files that must contain the private words."""

OPENINGS = ("What", "Whether", "How", "Which", "Where", "Of", "By")

PRIVATE_WORDS = {
    r"told|tells?|telling": "reported, printed, documented",
    r"foretells?|foretold|foretelling": "predict",
    r"given away|gives? away": "donated",
    r"spellers?": "code generator",
    r"likeliest": "most likely",
    r"anew": "again",
    r"whoever": "the caller, the user",
    r"nobody": "name the subject, or: unused",
    r"(?:is|are|was|were) no (?:finite )?numbers?": "is NaN or infinite, is not a number",
    r"made (?:of|from) weights|made parameters?|made weights?": "derived weights",
    r"(?:fewer|few) bits": "quantized, low-bit",
    r"whole numbers?": "integers",
    r"(?:is|are|was|were) had": "is available",
    r"to the bit": "bitwise identical",
    r"at last": "finally",
    r"so many|as many as may": "the number of, up to n",
    r"front door": "public API",
    r"the price of": "the cost of",
    r"ranks meet|ranks met|meetings?": "collective, ranks communicate",
}
"""Patterns of words that only this project uses in their sense, and the field's words."""

DEFINITIONS = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
PARTICIPLES = re.compile(
    r"_*(?:asked|called|chosen|drawn|done|found|given|had|held|kept|known|laid|left|made|"
    r"met|moved|named|needed|put|said|seen|sent|shown|spelled|taken|told|tried|wanted|written)_*"
)
_NAMES = re.compile(r"`[^`\n]*`|\{[^{}\n]*\}")
"""Names in backticks, and expressions in braces: identifiers, which are counted where they are defined."""
_WORDS = re.compile(r"\b(?:" + "|".join(PRIVATE_WORDS) + r")\b", re.IGNORECASE)
_NAME_PARTS = re.compile(r"(?:^|_)(told|tells|foretell|foretold|speller|likeliest|anew|whoever|nobody)(?=_|$)")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


@dataclass(frozen=True)
class Finding:
    """One counted place: the kind of count, the file relative to the root, the line, and the text."""

    kind: str
    file: str
    line: int
    text: str

    @property
    def folder(self) -> str:
        """The top-level folder, or "." for a file of the top level."""
        return self.file.split("/")[0] if "/" in self.file else "."


def findings_in_source(source: str, file: str) -> Iterator[Finding]:
    """Yield all findings in the text of a Python file.

    file    its path relative to the root, which decides between product and tests
    """
    product = file.split("/")[0] in PRODUCT
    tree = ast.parse(source)
    documented: dict[int, bool] = {}  # by id of a docstring or of a text below a field: True if its owner is public
    for owner, public in _owners(tree, public=True):
        for constant in _texts_of(owner):
            documented[id(constant)] = public
            opening = re.match(r"\W*(\w+)", constant.value)
            if opening and opening[1] in OPENINGS:
                yield Finding("openings", file, constant.lineno, constant.value.strip().split("\n")[0])
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            kind = _kind_of_string(product, documented.get(id(node)))
            for match in _private_words(node.value):
                line = node.lineno + node.value.count("\n", 0, match.start()) * (node.end_lineno != node.lineno)
                yield Finding(kind, file, line, _around(node.value, match))
    for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__):
        if token.type == tokenize.COMMENT:
            for match in _private_words(token.string):
                yield Finding("elsewhere", file, token.start[0], _around(token.string, match))
    yield from _findings_in_names(tree, file, product)


def findings_in_page(text: str, file: str) -> Iterator[Finding]:
    """Yield the private words in a Markdown page; code blocks count too, since they are read like the rest."""
    kind = "elsewhere" if file.startswith("docs/decisions/") else "pages"
    for number, line in enumerate(text.splitlines(), 1):
        for match in _private_words(line):
            yield Finding(kind, file, number, _around(line, match))


def all_findings() -> Iterator[Finding]:
    """Yield the findings in every Python file and every page of the repository, in a fixed order."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            if file not in OWN_FILES:
                yield from findings_in_source(path.read_text(encoding="utf-8"), file)
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        yield from findings_in_page(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())


def counts(findings: Iterator[Finding]) -> dict[str, dict[str, int]]:
    """Return the number of findings by kind and folder; a folder without any is left out."""
    numbers = Counter((finding.kind, finding.folder) for finding in findings)
    kinds = ("openings", "pages", "messages", "public", "elsewhere", "identifiers", "participles")
    return {kind: {f: n for (k, f), n in sorted(numbers.items()) if k == kind} for kind in kinds}


def _texts_of(node: ast.AST) -> Iterator[ast.Constant]:
    """Yield the docstring of a module, class or function, and the texts that stand below fields and constants in it."""
    if isinstance(node, ast.Module | DEFINITIONS):
        for statement in node.body:
            match statement:
                case ast.Expr(value=ast.Constant(value=str()) as constant):
                    yield constant


def _owners(node: ast.AST, public: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Yield every node that may have a docstring, with True if the node and all enclosing definitions are public."""
    yield node, public
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        public = False
    for child in ast.iter_child_nodes(node):
        private = isinstance(child, DEFINITIONS) and child.name.startswith("_")
        yield from _owners(child, public and not private)


def _private_words(text: str) -> Iterator[re.Match[str]]:
    """Yield the private words in a text; a text that is an identifier, and names in it, are not prose."""
    if not text.isidentifier():
        yield from _WORDS.finditer(_NAMES.sub(lambda name: " " * len(name[0]), text))


def _kind_of_string(product: bool, public: bool | None) -> str:
    if not product:
        return "elsewhere"
    if public is None:
        return "messages"
    return "public" if public else "elsewhere"


def _findings_in_names(tree: ast.Module, file: str, product: bool) -> Iterator[Finding]:
    for name, line in _definitions(tree):
        words = "_".join(_CAMEL.split(name)).lower()
        if _NAME_PARTS.search(words):
            yield Finding("identifiers", file, line, name)
    if product:
        for name, line in _public_definitions(tree, inside_function=False):
            if PARTICIPLES.fullmatch(name):
                yield Finding("participles", file, line, name)


def _definitions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield every name that a file defines, with the line of its first definition in its scope."""
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, node.lineno
            case ast.arg(arg=name):
                yield name, node.lineno
            case ast.Name(id=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno


def _public_definitions(node: ast.AST, inside_function: bool) -> Iterator[tuple[str, int]]:
    """Yield parameters of all functions, and fields and names of classes and modules that do not begin with _."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                if not inside_function and not name.startswith("_"):
                    yield name, child.lineno
                for argument in (*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs):
                    yield argument.arg, argument.lineno
                yield from _public_definitions(child, inside_function=True)
            case ast.ClassDef(name=name):
                yield name, child.lineno
                yield from _public_definitions(child, inside_function=False)
            case ast.AnnAssign(target=ast.Name(id=name)) if not inside_function and not name.startswith("_"):
                yield name, child.lineno
            case ast.Assign(targets=targets) if not inside_function:
                for target in targets:
                    if isinstance(target, ast.Name) and not target.id.startswith("_"):
                        yield target.id, child.lineno
            case ast.If() | ast.Try() | ast.With():
                yield from _public_definitions(child, inside_function)


def _around(text: str, match: re.Match[str]) -> str:
    start, end = max(0, match.start() - 40), match.end() + 40
    return " ".join(text[start:end].split())


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Count private words, headless docstrings and bare participles.")
    parser.add_argument("--list", metavar="KIND", help="print every place of one kind")
    parser.add_argument("--in", dest="within", metavar="PREFIX", default="", help="with --list: only below this path")
    parser.add_argument("--lower", action="store_true", help="lower the allowed counts to this tree's counts")
    options = parser.parse_args()
    findings = list(all_findings())
    if options.list:
        for finding in findings:
            if finding.kind == options.list and finding.file.startswith(options.within):
                print(f"{finding.file}:{finding.line}: {finding.text}")
        return 0
    present = counts(iter(findings))
    allowed: dict[str, dict[str, int]] = json.loads(ALLOWED.read_text()) if ALLOWED.exists() else {}
    if options.lower:
        lowered = {
            kind: {f: n for f, n in numbers.items() if n <= allowed.get(kind, {}).get(f, n)}
            | {f: allowed[kind][f] for f, n in numbers.items() if n > allowed.get(kind, {}).get(f, n)}
            for kind, numbers in present.items()
        }
        ALLOWED.write_text(json.dumps(lowered, indent=2) + "\n")
        allowed = lowered
    for kind, numbers in present.items():
        print(f"{kind:12} {sum(numbers.values()):5}   " + ", ".join(f"{f} {n}" for f, n in numbers.items()))
    failures = [
        f"{kind} in {folder}: {number}, allowed {allowed.get(kind, {}).get(folder, 0)}"
        for kind, numbers in present.items()
        for folder, number in numbers.items()
        if number > allowed.get(kind, {}).get(folder, 0)
    ]
    failures += [
        f"{finding.file}:{finding.line}: a docstring begins with Whether: {finding.text}"
        for finding in findings
        if finding.kind == "openings" and finding.text.startswith("Whether")
    ]
    for failure in failures:
        print(f"plain English: {failure}", file=sys.stderr)
    if failures:
        print("  try       python -m tests.plain_english --list KIND, and docs/glossary.md", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
