"""What the command line tells: facts as plain data, which `--json` prints, and the same as text and tables."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from treadle.backends.protocol import Port
from treadle.backends.registry import find_backend
from treadle.compiled import Compiled
from treadle.ir.analysis.cost import graph_cost, parameter_bytes, parameter_count, state_bytes
from treadle.ir.analysis.encounters import Encounter, Verdict
from treadle.ir.analysis.following import Following
from treadle.ir.errors import TreadleError
from treadle.ir.graph import Graph
from treadle.ir.target import Target
from treadle.passes.framework.pass_log import PassLog

Facts = dict[str, Any]

_SHOWN_VALUES = 64  # an output of at most this many elements is told in full
_PIPED_WIDTH = 120


class _Plain(Console):
    """A console that leaves it to its caller what to do where the reader of its output has left."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console(*, stderr: bool = False) -> Console:
    """A console for tables: as wide as the terminal, colours only there."""
    stream = sys.stderr if stderr else sys.stdout
    return _Plain(stderr=stderr, highlight=False, markup=False, width=None if stream.isatty() else _PIPED_WIDTH)


# -- numbers ---------------------------------------------------------------------------------------------------


def human(count: float, unit: str = "") -> str:
    """A count in three digits with its prefix: `124 M`, `497 MB`, `1.36 GFLOPs`."""
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= scale * 0.9995:
            return f"{count / scale:.3g} {prefix}{unit}"
    return f"{count:.3g} {unit}".strip()


def rate_text(rate: float, dtype: str) -> str:
    """Operations a second on numbers of a dtype: `118 GFLOP/s in f32`, `471 GOP/s in int8`."""
    return f"{human(rate, 'OP' if dtype == 'int8' else 'FLOP')}/s in {dtype}"


def counted(count: int, what: str) -> str:
    """`1 op`, `2 ops`, `1,024 parameters`: the plural ends in s, and `pass` and its like in es."""
    ending = "" if count == 1 else "es" if what.endswith(("s", "sh", "ch", "x")) else "s"
    return f"{count:,} {what}{ending}"


def sizes_text(sizes: Mapping[str, int]) -> str:
    """`B=1, S=128`"""
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


# -- graphs ----------------------------------------------------------------------------------------------------


def graph_facts(graph: Graph, sizes: Mapping[str, int]) -> Facts:
    """Parameters; of the last entry the cost of a run at these sizes, inputs and outputs; how often each function is
    called; of a graph with states or several entries, these too."""
    cost = graph_cost(graph, sizes)
    main = graph.main
    facts: Facts = {
        "model": graph.name,
        "parameters": parameter_count(graph),
        "parameter_bytes": parameter_bytes(graph),
        "sizes": dict(sizes),
        "flops": cost.flops,
        "bytes": cost.bytes,
        "inputs": [port_facts(Port(v.name, v.type)) for v in main.inputs],
        "outputs": [port_facts(Port(name, v.type)) for name, v in main.outputs.items()],
        "functions": [
            {"name": f.name, "ops": len(f.nodes), "calls": calls}
            for f, calls in zip(graph.functions.values(), count_calls(graph).values(), strict=True)
        ],
    }
    if graph.entry_names != ("main",):
        facts["entries"] = list(graph.entry_names)
    if graph.states:
        facts["states"] = [
            {**port_facts(Port(name, v.type)), "bytes": v.type.bytes_at(sizes)} for name, v in graph.states.items()
        ]
        facts["state_bytes"] = state_bytes(graph, sizes)
    return facts


def port_facts(port: Port) -> Facts:
    return {"name": port.name, "dtype": str(port.dtype), "axes": list(port.axes)}


def count_calls(graph: Graph) -> dict[str, int]:
    """How often one run enters each function, in the graph's order."""
    calls = dict.fromkeys(graph.functions, 0)
    calls |= dict.fromkeys(graph.entry_names, 1)
    for function in reversed(graph.functions.values()):
        for node in function.nodes:
            if node.op.callee is not None:
                calls[node.op.callee] += calls[function.name]
    return calls


def count_run_ops(graph: Graph) -> Counter[str]:
    """How many ops of each name one run computes, calls of functions opened."""
    calls = count_calls(graph)
    ops: Counter[str] = Counter()
    for function, node in graph.walk():
        if node.op.callee is None:
            ops[node.op.name] += calls[function.name]
    return ops


def backend_source(graph: Graph, backend: str) -> str:
    """What a backend makes of a graph. The code does not depend on the weights, so these are zeros."""
    weights = {
        name: np.zeros(value.type.held.evaluate({}), value.type.held.dtype.numpy)
        for name, value in graph.parameters.items()
    }
    return find_backend(backend).compile(graph, Target("cpu"), weights).source


def graph_header(facts: Facts, stage: str) -> str:
    """Facts as comment lines, which may stand before a graph's text."""
    functions = [f for f in facts["functions"] if f["name"] not in facts.get("entries", ["main"])]
    ops = sum(f["ops"] for f in facts["functions"])
    blocks = ", ".join(f"{f['name']} is called {counted(f['calls'], 'time')}" for f in functions)
    lines = [
        f"{facts['model']} {stage}: {counted(ops, 'op')}" + (f"; {blocks}" if blocks else ""),
        f"{counted(facts['parameters'], 'parameter')}, {human(facts['parameter_bytes'], 'B')}",
        f"a run {'at ' + sizes_text(facts['sizes']) if facts['sizes'] else ''}".strip()
        + f": {human(facts['flops'], 'FLOPs')}, {human(facts['bytes'], 'B')} read and written",
    ]
    if "states" in facts:
        lines.append(f"{counted(len(facts['states']), 'state')}, {human(facts['state_bytes'], 'B')}")
    return "".join(f"# {line}\n" for line in lines)


# -- following an axis -----------------------------------------------------------------------------------------


def following_facts(following: Following) -> Facts:
    """Where an axis is held and whether it may be stepped, packed and split, with reasons."""
    verdicts = {"step": following.step(), "pack": following.pack(), "split": following.split()}
    return {
        "axis": following.axis,
        "parameters": following.parameters,
        "outputs": following.outputs,
        **{name: _verdict_facts(verdict) for name, verdict in verdicts.items()},
    }


def _verdict_facts(verdict: Verdict) -> Facts:
    return {
        "may": bool(verdict),
        "against": [_encounter_facts(e) for e in verdict.against],
        "combine": [{"by": c.by, **_encounter_facts(c.encounter), "why": str(c)} for c in verdict.combine],
    }


def _encounter_facts(e: Encounter) -> Facts:
    return {"op": e.node.op.name, "why": str(e), "source": e.line, "scope": e.scope, "times": e.count}


def following_text(following: Following) -> str:
    return "\n".join(map(str, (following.step(), following.pack(), following.split())))


# -- compilation -----------------------------------------------------------------------------------------------


def compiled_facts(compiled: Compiled, seconds: float) -> Facts:
    """What was compiled, for where, in what time, and what each pass did."""
    ops = count_run_ops(compiled.graph)
    return {
        "model": compiled.name,
        "backend": compiled.backend,
        "target": str(compiled.target),
        "cores": compiled.target.cores(),
        "seconds": seconds,
        "inputs": [port_facts(p) for p in compiled.inputs],
        "outputs": [port_facts(p) for p in compiled.outputs],
        "parameters": parameter_count(compiled.graph),
        "weights": weights_text(compiled),
        "unused": list(compiled.unused),
        "ops": dict(ops.most_common()),
        **({} if compiled.memory is None else {"memory": compiled.memory.as_dict()}),
        **compiled.log.as_dict(times=True),
    }


def weights_text(compiled: Compiled) -> str:
    return "read from the checkpoint" if compiled.seed is None else f"drawn from seed {compiled.seed}"


def compiled_lines(compiled: Compiled, seconds: float) -> Iterable[str]:
    """What `compile` says beside the pass table."""
    target, ops = compiled.target, count_run_ops(compiled.graph)
    cores = target.cores()
    yield f"{compiled.name}({', '.join(map(str, compiled.inputs))})"
    yield f"  -> ({', '.join(map(str, compiled.outputs))})"
    passes = sum(record.seconds for record in compiled.log)
    yield f"compiled in {seconds:.2f} s, {passes * 1e3:.0f} ms of it in passes"
    yield f"all of it runs in {compiled.backend} on {target}, {target.description}" + (
        f", {counted(cores, 'core')}" if cores else ""
    )
    yield f"a run is {counted(ops.total(), 'op')}: " + ", ".join(f"{n} {name}" for name, n in ops.most_common())
    yield f"{counted(parameter_count(compiled.graph), 'parameter')}, {weights_text(compiled)}"
    if compiled.unused:
        shown = ", ".join(compiled.unused[:4]) + (", ..." if len(compiled.unused) > 4 else "")
        yield f"{counted(len(compiled.unused), 'tensor')} of the checkpoint not used: {shown}"


def pass_table(log: PassLog) -> Table:
    """A line a pass: ops before and after, what changed, how often it refused or nearly matched."""
    table = plain_table("pass", "ops", "change", "refused", "nearly", "ms", numbers={"ops", "refused", "nearly", "ms"})
    for r in log:
        ops = f"{r.before.total()} -> {r.after.total()}" if r.changed else str(r.after.total())
        changes = Items([f"{delta:+d} {name}" for name, delta in r.op_changes.items()])
        refused, nearly = (str(len(events) or "") for events in (r.refusals, r.near_misses))
        table.add_row(r.name, ops, changes, refused, nearly, f"{r.seconds * 1e3:.1f}", style="" if r.changed else "dim")
    return table


# -- arrays ----------------------------------------------------------------------------------------------------


def array_facts(array: np.ndarray[Any, Any]) -> Facts:
    """An output in short: dtype, shape, least, mean and greatest of its finite elements; in full where it is small."""
    finite = array[np.isfinite(array)] if array.dtype.kind == "f" else array
    numbers = finite.astype(np.float64) if finite.size else None
    facts: Facts = {
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "min": None if numbers is None else shortest(array.dtype.type(numbers.min())),
        "mean": None if numbers is None else shortest(_mean(numbers, array.dtype)),
        "max": None if numbers is None else shortest(array.dtype.type(numbers.max())),
        "not_finite": array.size - finite.size,
    }
    if array.size <= _SHOWN_VALUES:
        facts["values"] = _plain(shortest(array))
    return facts


def _mean(numbers: np.ndarray[Any, Any], dtype: np.dtype[Any]) -> Any:
    mean = numbers.mean()
    return dtype.type(mean) if dtype.kind == "f" else mean


def shortest(numbers: Any) -> Any:
    """Numbers and lists of NumPy's as Python's, floats in the fewest digits that tell them apart in their own dtype:
    0.1 for float32's 0.1, which is 0.10000000149011612 in Python's float64.
    """
    if getattr(numbers, "ndim", 0):
        return [shortest(each) for each in numbers]
    return float(str(numbers)) if np.asarray(numbers).dtype.kind == "f" else numbers.item()


def array_table(outputs: Mapping[str, Facts]) -> Table:
    numbers = ("min", "mean", "max", "not finite")
    table = plain_table("output", "dtype", "shape", *numbers, numbers=set(numbers))
    for name, facts in outputs.items():
        told = ["" if facts[key] is None else f"{facts[key]:.6g}" for key in ("min", "mean", "max")]
        shape = " x ".join(map(str, facts["shape"])) or "scalar"
        table.add_row(name, facts["dtype"], shape, *told, str(facts["not_finite"] or ""))
    return table


def _plain(value: Any) -> Any:
    """Numbers and lists as JSON has them: what is not finite becomes null."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def similarity_table(sentences: Sequence[str], similarity: np.ndarray[Any, Any]) -> Table:
    """Cosine similarities, near ones marked."""
    table = plain_table(
        "", *map(str, range(1, len(sentences) + 1)), numbers=set(map(str, range(1, len(sentences) + 1)))
    )
    for i, (sentence, row) in enumerate(zip(sentences, similarity, strict=True)):
        cells = [Text(f"{x:.2f}", style="bold green" if x > 0.5 and i != j else "") for j, x in enumerate(row)]
        shown = sentence if len(sentence) <= 48 else f"{sentence[:45]}..."
        table.add_row(Text(f"{i + 1}  {shown}", no_wrap=True, overflow="ellipsis"), *cells)
    return table


# -- the zoo ---------------------------------------------------------------------------------------------------


def zoo_facts() -> Facts:
    """The zoo's families with their defaults, and the models that can be fetched or were."""
    from treadle.fetch import fetched_model
    from treadle.models.registry import family_names, find_family
    from treadle.wheels.pinned_models import PINNED

    zoo = []
    for name in family_names():
        family = find_family(name)
        zoo.append(
            {
                "name": name,
                "description": family.model.description,
                "parameters": parameter_count(family.model.graph()),
                "defaults": {key: _config_text(value) for key, value in family.model.defaults.items()},
                "model_types": list(family.model_types),
            }
        )
    fetched = []
    for wheel in PINNED.values():
        path = fetched_model(wheel.name)
        where = None if path is None else str(path)
        fetched.append({"name": wheel.name, "about": wheel.about, "download_bytes": wheel.size, "path": where})
    return {"zoo": zoo, "fetched": fetched}


def _config_text(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_config_text(each) for each in value]
    return value if value is None or isinstance(value, bool | int | float | str) else f"t.{value.__name__}"


def zoo_tables(facts: Facts) -> Iterable[Table | Text]:
    """The zoo; what can be fetched; and where what was fetched lies, a path a line, whole however narrow it is."""
    zoo = plain_table("zoo", "what it is", "parameters", "defaults", numbers={"parameters"})
    for each in facts["zoo"]:
        defaults = Items([f"{key}={value}" for key, value in each["defaults"].items()])
        zoo.add_row(each["name"], each["description"], human(each["parameters"]), defaults)
    yield zoo
    pinned = plain_table("fetch", "what it is", "download", "", numbers={"download"})
    for each in facts["fetched"]:
        told = Text("is here") if each["path"] else Text(f"treadle fetch {each['name']}", style="dim", no_wrap=True)
        pinned.add_row(each["name"], each["about"], human(each["download_bytes"], "B"), told)
    yield pinned
    paths = [(each["name"], each["path"]) for each in facts["fetched"] if each["path"]]
    if paths:
        width = max(len(name) for name, _ in paths)
        yield Text("\n".join(f"{name:<{width}}  {path}" for name, path in paths))


# -- errors ----------------------------------------------------------------------------------------------------


def error_facts(error: TreadleError) -> Facts:
    """An error's parts under the labels that its text has."""
    parts = {
        "what": error.what,
        "received": error.received,
        "in": error.within,
        "from": error.source,
        "try": error.hint,
    }
    return {"kind": type(error).__name__, **{label: text for label, text in parts.items() if text}}


def error_text(error: TreadleError) -> Text:
    text = Text(str(error))
    text.stylize("bold red", 0, len(error.what))
    return text


@dataclass(frozen=True)
class Items:
    """Texts in a row, parted by commas; the row goes on in a further line only between two of them."""

    texts: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [""]
        for text in self.texts:
            joined = f"{lines[-1]}, {text}" if lines[-1] else text
            if cell_len(joined) < options.max_width or not lines[-1]:
                lines[-1] = joined
            else:
                lines[-1] += ","
                lines.append(text)
        yield Text("\n".join(lines))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max((cell_len(text) + 1 for text in self.texts), default=0)
        return Measurement(longest, max(longest, cell_len(", ".join(self.texts)) + 1))


def plain_table(*columns: str, numbers: set[str]) -> Table:
    """An empty table of these columns, in which those of numbers are flush right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table
