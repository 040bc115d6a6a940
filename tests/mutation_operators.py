"""Mutation operators and their random choice: the operators of cosmic-ray, and three others."""

from __future__ import annotations

import ast
import difflib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator

from tests.line_map import FOLDERS

ROOT = Path(__file__).parents[1]


class DropReturned(Operator):
    """return x   -->   return None"""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type == "return_stmt" and node.children[1].get_code().strip() != "None":
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.children[1:] = [parso.parse(" None")]
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class DropKeyword(DropReturned):
    """f(x, k=v)   -->   f(x)"""

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type in ("arglist", "trailer"):
            for argument in self._keywords(node):
                yield argument.start_pos, argument.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        at = node.children.index(self._keywords(node)[index])
        # also removes the comma before the argument, or else the one after it
        first = 0 if node.children[at - 1] == "," else 1
        after = first and node.children[at + 1] == ","
        del node.children[at - (not first) : at + 1 + after]
        return node

    def _keywords(self, node: Any) -> list[Any]:
        return [c for c in node.children if c.type == "argument" and c.children[1] == "="]


class TurnMembership(DropReturned):
    """x in y   -->   x not in y, and back"""

    TURNED = {"in": " not in", "not in": " in"}

    def mutation_positions(self, node: Any) -> Iterator[Any]:
        if node.type == "comparison" and node.children[1].get_code().strip() in self.TURNED:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.children[1] = parso.parse(self.TURNED[node.children[1].get_code().strip()])
        return node


def _named(form: str, pairs: str) -> list[Operator]:
    return [get_operator(f"core/{form}_{pair}")() for pair in pairs.split()]


KINDS: dict[str, list[Operator]] = {
    "comparison": [
        *_named(
            "ReplaceComparisonOperator", "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt"
        ),
        *_named("ReplaceComparisonOperator", "Is_IsNot IsNot_Is"),
        TurnMembership(),
    ],
    "arithmetic": _named(
        "ReplaceBinaryOperator",
        "Add_Sub Sub_Add Mul_FloorDiv Mul_Add Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul BitAnd_BitOr BitOr_BitAnd "
        "LShift_RShift RShift_LShift",
    ),
    "sign": _named("ReplaceUnaryOperator", "Delete_Not Delete_USub Delete_Invert"),
    "constant": [get_operator("core/NumberReplacer")()],
    "truth": [get_operator(f"core/Replace{turn}")() for turn in ("TrueWithFalse", "FalseWithTrue")],
    "logic": [get_operator(f"core/Replace{turn}")() for turn in ("AndWithOr", "OrWithAnd")],
    "condition": [get_operator("core/AddNot")()],
    "loop": [
        get_operator(f"core/{name}")()
        for name in ("ZeroIterationForLoop", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak")
    ],
    "except": [get_operator("core/ExceptionReplacer")()],
    "return": [DropReturned()],
    "keyword": [DropKeyword()],
}


@dataclass
class Mutation:
    """One mutation and its outcome.

    name     seed/number
    outcome  noticed | timeout | survived | unreached (no test is known to run the line)
    by       the test that noticed
    tests    number of tests that were run
    same     the reason why the mutated program is equivalent, if it was judged equivalent
    """

    name: str
    file: str
    line: int
    kind: str
    change: str
    outcome: str = ""
    by: str = ""
    tests: int = 0
    seconds: float = 0.0
    same: str = ""


def draw(count: int, seed: int, under: Sequence[str] = FOLDERS) -> Iterator[tuple[Mutation, str]]:
    """Yield random mutations, each with the text of the mutated file. A file is drawn weighted by its length, then a
    line, a kind and an occurrence.

    under  folders or files to draw from
    """
    rng = random.Random(seed)
    places = [ROOT / each for each in under]
    files = sorted(path for place in places for path in ([place] if place.is_file() else place.rglob("*.py")))
    lengths = [len(path.read_text().splitlines()) for path in files]
    drawn: set[str] = set()
    while len(drawn) < count:
        path = rng.choices(files, lengths)[0]
        source = path.read_text()
        sites = list(_sites(source))
        if not sites:
            continue
        line = rng.choice(sorted({site[0] for site in sites}))
        kind = rng.choice(sorted({site[1] for site in sites if site[0] == line}))
        _, _, operator, occurrence = rng.choice([site for site in sites if site[:2] == (line, kind)])
        text = mutate_code(source, operator, occurrence)
        change = "\n".join(list(difflib.unified_diff(source.splitlines(), text.splitlines(), lineterm="", n=0))[3:])
        if _means(text) not in (None, _means(source)) and path.name + change not in drawn:
            drawn.add(path.name + change)
            yield Mutation(f"{seed}/{len(drawn)}", str(path.relative_to(ROOT)), line, kind, change), text


def _sites(source: str) -> Iterator[tuple[int, str, Operator, int]]:
    """Yield line, kind, operator and occurrence of every possible mutation, except in annotations and in data for
    tests.
    """
    nodes = list(ast_nodes(get_ast(source)))
    for kind, operators in KINDS.items():
        for operator in operators:
            occurrence = 0
            for node in nodes:
                for start, _ in operator.mutation_positions(node):
                    if not _is_idle(node):
                        yield start[0], kind, operator, occurrence
                    occurrence += 1


def _is_idle(node: Any) -> bool:
    if node.type == "if_stmt" and node.children[1].get_code().strip() == "TYPE_CHECKING":
        return True
    while node.parent is not None:
        above = node.parent
        if above.type in ("annassign", "tfpdef") and node is above.children[1 if above.type == "annassign" else 2]:
            return True
        if above.type == "funcdef" and node is above.annotation:
            return True
        if above.type == "expr_stmt" and _is_of_tests(above.children[0].get_code()):
            return True
        if above.type == "if_stmt" and above.children[1].get_code().strip() == "TYPE_CHECKING":
            return True
        if above.type == "decorated" and above.children[0].get_code().strip() == "@overload":
            return True
        node = above
    return False


def _is_of_tests(name: str) -> bool:
    """Return True if this name holds data for tests, such as `samples` of an op, or `_SAMPLES` of several."""
    return name.strip().strip("_").lower() in ("samples", "errors", "all")


def _means(source: str) -> str | None:
    try:
        return ast.dump(ast.parse(source))
    except SyntaxError:
        return None
