"""Read and check the contents of an artifact: a `.treadle` file, which `treadle.artifacts.writing` writes.

    artifact = open_artifact("gpt2.treadle")
    artifact.optimized.graph

docs/artifacts.md describes the layout and the checks.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from treadle.artifacts.file import SectionFile
from treadle.files.contained_files import PathLike
from treadle.files.limits import MORE, check_limits, limit_hint, limits_of
from treadle.files.shown_names import printable, shown_path
from treadle.files.strict_json import JsonReader, read_json_object
from treadle.frontends.safetensors_file import CheckpointLimits as HeaderLimits
from treadle.ir.analysis.narrow_reads import read_only_in
from treadle.ir.collector_pause import collection_paused
from treadle.ir.errors import CheckpointError, PassError, TreadleError
from treadle.ir.graph import Function, Graph
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.scanner import TextLimits
from treadle.ir.transforms.encoded_weights import given_parameters
from treadle.ir.types import bf16, f32
from treadle.ir.verifier import verify
from treadle.models.registry import family_names
from treadle.passes.certificates.certificate import Certificate
from treadle.passes.framework.manager import Optimized
from treadle.passes.framework.pass_log import Event, PassLog, PassRecord, count_ops
from treadle.passes.sharding.plan import ShardingPlan
from treadle.passes.sharding.plan_reading import read_plan
from treadle.program.places import GGUF_SUFFIX, ONNX_SUFFIX, is_fetched

SUFFIX = ".treadle"
SHARDING = "sharding"
"""Name of the section that holds the sharding plan, if the artifact has a plan."""

HEADER_LIMITS = HeaderLimits(header_bytes=4 * 2**20, tensors=10_000, values=10_000)
GRAPH_LIMITS = TextLimits(
    characters=8 * 2**20,
    functions=500,
    nodes=4_000,
    operands=20_000,
    parameters=5_000,
    literal_bytes=8 * 2**20,
    rank=16,
    items=256,
    nesting=8,
    type_characters=300,
    expression_characters=1_000,
    symbols=500,
    arguments=5_000,
    name_characters=1_000,
    work=300_000,
)
"""Limits for each of an artifact's two graphs."""

_OPTION_VALUES = 10_000  # maximum number of values in the recorded options
_FIELDS = ("name", "backend", "target", "passes", "seed", "options")


@dataclass(frozen=True)
class ArtifactLimits:
    """Limits on an artifact. Every field may be raised.

    header      limits on the file's header: its length, the number of sections
    graph       limits on each of the two graphs: characters, nodes, operands, parameters, ...
    log_bytes   length of the pass log
    log_values  number of values in the pass log; also of the op counts that are kept from pass to pass
    plan_bytes  length of the sharding plan
    plan_values number of values in the sharding plan
    plan_ranks  number of ranks of the sharding plan's mesh
    """

    header: HeaderLimits = field(default_factory=lambda: HEADER_LIMITS)
    graph: TextLimits = field(default_factory=lambda: GRAPH_LIMITS)
    log_bytes: int = 4 * 2**20
    log_values: int = 50_000
    plan_bytes: int = 4 * 2**20
    plan_values: int = 200_000
    plan_ranks: int = 16_384

    @classmethod
    def of(cls, limits: ArtifactLimits | Mapping[str, int] | None) -> ArtifactLimits:
        """Return the limits for a mapping of limits by name, which may include fields of `header` and `graph`. Raises
        UsageError for an unknown name.
        """
        if not isinstance(limits, Mapping):
            return limits_of(cls, limits)
        own = cls()
        names = {part: {f.name for f in fields(part)} for part in (own.header, own.graph, own)}
        check_limits(limits, sorted(set().union(*names.values()) - {"header", "graph"}))
        header, graph, rest = ({n: limits[n] for n in limits if n in known} for known in names.values())
        return replace(own, header=replace(own.header, **header), graph=replace(own.graph, **graph), **rest)


def is_artifact(model: object) -> bool:
    """Return True if MODEL names an artifact: a path that ends in .treadle."""
    return isinstance(model, str | Path) and Path(model).suffix == SUFFIX


@dataclass(frozen=True)
class Artifact:
    """The contents of an artifact, before a backend lowers them.

    name, backend, target, passes, seed  the choices at compile time
    options                              the other options that were set at compile time, as JSON
    optimized                            the declared graph, the optimized graph, and the pass log without times
    weights                              the weights by name, memory-mapped
    seal                                 64 hexadecimal digits that identify the content
    sharding                             the checked sharding plan of the optimized graph, or None
    files                                the files of the tokenizer by name, for a model that continues text
    """

    name: str
    backend: str
    target: str
    passes: str
    seed: int | None
    optimized: Optimized
    weights: Mapping[str, Any] = field(repr=False)
    seal: str
    sharding: ShardingPlan | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)


@collection_paused()
def open_artifact(
    path: PathLike, *, limits: ArtifactLimits | Mapping[str, int] | None = None, check: bool = True
) -> Artifact:
    """Read an artifact without compiling it.

    check  True to compare every weight with its hash, which reads the whole file once. If False, only the texts are
           compared, and weights are read when they are used.

    Raises CheckpointError, ParseError or VerifyError, with section and place, if the file is damaged, is not an
    artifact, or exceeds a limit; PassError for an invalid sharding plan.
    """
    known = ArtifactLimits.of(limits)
    _refuse_model(path)
    file = SectionFile(path, known.header, check=check)
    metadata = file.metadata
    for key in [*metadata, *_FIELDS]:
        if key not in metadata or key not in _FIELDS:
            what = "a field is missing" if key in _FIELDS else "the format has no such field"
            file.fail(what, f"__metadata__, {printable(key)}")
    seed = metadata["seed"]
    if seed and not (seed.isascii() and seed.isdigit() and len(seed) < 40):
        file.fail("the seed must be digits or nothing", "__metadata__, seed", received=printable(seed))
    declared, graph = (_read_graph(file, section, known.graph) for section in ("declared", "graph"))
    _check_pair(file, declared, graph)
    log = _read_log(file, declared, graph, known)
    return Artifact(
        metadata["name"],
        metadata["backend"],
        metadata["target"],
        metadata["passes"],
        int(seed) if seed else None,
        optimized=Optimized(declared, graph, log),
        weights=_read_weights(file, graph),
        seal=file.seal,
        sharding=_read_sharding(file, graph, known) if SHARDING in file else None,
        options=_read_options(file, metadata["options"]),
        files=file.files,
    )


def _refuse_model(path: PathLike) -> None:
    """Raise UsageError if `path` names a model that `treadle.compile` reads instead: a folder, a file of weights, a
    declaration, or a model's name.
    """
    text = os.fspath(path)
    for_tasks = os.path.isdir(text) or Path(text).suffix == GGUF_SUFFIX or is_fetched(text)
    if os.path.isdir(text):
        kind = "a folder"
    elif Path(text).suffix in (ONNX_SUFFIX, GGUF_SUFFIX):
        kind = f"{'an ONNX' if Path(text).suffix == ONNX_SUFFIX else 'a GGUF'} file"
    elif Path(text.rpartition(":")[0]).suffix == ".py":
        kind = "a declaration in a Python file"
    elif is_fetched(text) or (text in family_names() and not os.path.exists(text)):
        kind = "the name of a model"
    else:
        return
    raise CheckpointError(
        f"not an artifact (a {SUFFIX} file)",
        received=kind,
        within=shown_path(path),
        hint=f"treadle.compile({text!r})" + (f", or treadle.load({text!r}) for its tasks" if for_tasks else ""),
    )


def _read_graph(file: SectionFile, section: str, limits: TextLimits) -> Graph:
    text = file.text(section, limits.characters, "characters")
    try:
        graph = parse_graph(text, limits)
        verify(graph)
    except TreadleError as error:
        error.within = f"{file.path}: section {section}" + (f", {error.within}" if error.within else "")
        raise
    return graph


def _read_sharding(file: SectionFile, graph: Graph, limits: ArtifactLimits) -> ShardingPlan:
    text = file.text(SHARDING, limits.plan_bytes, "plan_bytes")
    within = f"{file.path}: section {SHARDING}"
    record = read_json_object(text.encode(), within, nesting=32, values=limits.plan_values)
    try:
        return read_plan(record, graph, most_ranks=limits.plan_ranks)
    except PassError as error:
        error.within = within + (f", {error.within}" if error.within else "")
        raise


def _check_pair(file: SectionFile, declared: Graph, graph: Graph) -> None:
    """Check that both graphs have the same inputs and outputs, and that the optimized graph adds no weights except the
    smoothing vectors of products.
    """
    for what, of in (("inputs", _inputs), ("outputs", _outputs)):
        if of(declared.main) != of(graph.main):
            file.fail(f"the optimized graph has other {what} than the declared one", f"section graph, {what} of main")
    for name in given_parameters(graph):
        value = graph.parameters[name]
        known = declared.parameters.get(name)
        if known is None or value.type.decoded != known.type.decoded:
            file.fail("the optimized graph has a weight that was not declared", f"section graph, ${printable(name)}")


def _inputs(main: Function) -> list[tuple[str, Any]]:
    return [(v.name, v.type) for v in main.inputs]


def _outputs(main: Function) -> list[tuple[str, Any]]:
    return [(name, v.type) for name, v in main.outputs.items()]


def _read_weights(file: SectionFile, graph: Graph) -> dict[str, Any]:
    """Return the graph's weights, checked against the graph's types. A section for any other weight is an error. A
    float32 weight that is only read in bf16 may be stored in bf16.
    """
    records = file.weights
    for name in [*graph.parameters, *records]:
        if name not in records or name not in graph.parameters:
            what = "a weight that the graph does not use" if name in records else "a weight is missing"
            file.fail(what, f"section weight/{printable(name)}")
    narrow = read_only_in(bf16, graph)
    for name, value in graph.parameters.items():
        record, wanted = records[name], value.type.storage_type
        is_narrow = record.dtype == bf16.name and wanted.dtype is f32 and name in narrow
        if not (is_narrow or record.dtype == wanted.dtype.name) or record.shape != wanted.static_shape:
            file.fail(f"the weight must be {wanted}", f"section weight/{printable(name)}", received=str(record))
    return {name: file.weight(name) for name in graph.parameters}


# -- the pass log --------------------------------------------------------------------------------------------------


def _read_options(file: SectionFile, text: str) -> dict[str, Any]:
    """Return the recorded options, a JSON object. They are only displayed."""
    place = f"{file.path}: __metadata__, options"
    return read_json_object(text.encode(errors="replace"), place, nesting=16, values=_OPTION_VALUES)


def _read_log(file: SectionFile, declared: Graph, graph: Graph, limits: ArtifactLimits) -> PassLog:
    """Return the pass log. Op counts start with the declared graph's, and each pass's changes are added.

    Times and intermediate graphs are not stored.
    """
    text = file.text("log", limits.log_bytes, "log_bytes")
    reader = JsonReader(text.encode(), f"{file.path}: section log", nesting=16, values=limits.log_values)
    data = reader.value()
    reader.end()
    passes = data.get("passes") if isinstance(data, dict) else None
    if not isinstance(passes, list):
        file.fail("the pass log has no list of passes", "section log")
    counts = count_ops(declared)
    records: list[PassRecord] = []
    carried = 0
    for number, said in enumerate(passes):
        carried += len(counts)
        if carried > limits.log_values:
            hint = limit_hint("log_values", MORE * limits.log_values)
            file.fail("the pass log counts more ops than the limit", f"section log, pass {number}", hint)
        try:
            records.append(_read_record(said, counts))
        except (TypeError, KeyError, AttributeError, ValueError):
            file.fail("the pass log has an invalid record", f"section log, pass {number}")
        counts = records[-1].after
    if +counts != count_ops(graph):
        file.fail("the op counts at the end of the pass log differ from the optimized graph's", "section log")
    if records:
        records[-1].graph = graph
    return PassLog(records)


def _read_record(said: Any, before: Counter[str]) -> PassRecord:
    """Return one pass record from the JSON that `PassRecord.as_dict` writes. If the JSON has another form, raises
    ValueError, TypeError, KeyError or AttributeError.
    """
    ops, changes = said["ops"], said["changes"]
    after = before.copy()
    for op, delta in ops["changes"].items():
        after[op] += delta
    if (before.total(), after.total()) != (ops["before"], ops["after"]) or not isinstance(changes, int):
        raise ValueError("counts disagree")
    if any(count < 0 for count in after.values()):
        raise ValueError("a negative number of ops")
    return PassRecord(
        _text(said["pass"]),
        _text(said["options"]),
        before,
        after,
        changes,
        matches=[_read_event(event) for event in said["matches"]],
        refusals=[_read_event(event) for event in said["refusals"]],
        near_misses=[_read_event(event) for event in said["near_misses"]],
        notes=[_text(note) for note in said["notes"]],
        certificates=[Certificate.read(each) for each in said.get("certificates", ())],
    )


def _read_event(said: Any) -> Event:
    """Return an event. In old files, without the fields `matched` and `edge`, both are part of the reason's text."""
    matched = said.get("matched", [])
    if {"given", "made"}.intersection(said) or not isinstance(matched, list):
        raise TypeError("not a list of ops, or a field that events do not have")
    fields: dict[str, Any] = {name: _text(value) for name, value in said.items() if name != "matched"}
    return Event(**fields, matched=tuple([_text(op) for op in matched]))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not a string")
    return value
