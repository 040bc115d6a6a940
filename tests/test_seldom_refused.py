"""Refusals that no other test provokes, one per line: the kind of error and its beginning.

The whole texts are in tests/golden/errors/, like the texts of all errors.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, cast
from unittest.mock import patch

import numpy as np
import pytest

import treadle as t
from tests.stepped_models import MODELS
from treadle.artifacts.file import write_sections
from treadle.artifacts.reading import ArtifactLimits
from treadle.backends.numpy.backend import NumpyBackend
from treadle.backends.onnx.exporter import export_onnx
from treadle.backends.protocol import Port
from treadle.backends.staged import StagedBackend, build
from treadle.cli.application import app
from treadle.continuation import TextWriter
from treadle.explaining.layouts import explain_layouts
from treadle.explaining.memory import compare_memory, explain_memory
from treadle.explaining.storage import explain_storage
from treadle.fetching import _only_file
from treadle.files.limits import limits_of
from treadle.frontends.declaration_files import load_declaration
from treadle.frontends.gguf_blocks import import_gguf
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.onnx_import.file import OnnxFile
from treadle.frontends.rotary import Divided, Dynamic, LongRope
from treadle.frontends.safetensors_file import CheckpointLimits
from treadle.frontends.text import TextTokenizer
from treadle.frontends.vocabularies.gguf_tokenizer import build_gguf_tokenizer
from treadle.ir.builder import Builder
from treadle.ir.composites import body_of
from treadle.ir.encodings.encoding import Encoding, parse_encoding
from treadle.ir.errors import (
    BackendError,
    CheckpointError,
    FrontendError,
    GraphError,
    PassError,
    RankError,
    RuleError,
    SizeError,
    TreadleError,
    UsageError,
)
from treadle.ir.graph import Function, Graph
from treadle.ir.interpreter import interpret, interpret_function
from treadle.ir.layouts import parse_layout
from treadle.ir.op_registry import OPS, op
from treadle.ir.operation import Composite, Op
from treadle.ir.ops.caches import check_slots
from treadle.ir.ops.collectives import Collective, Starting
from treadle.ir.ops.normalization import Softmax
from treadle.ir.samples import Sample
from treadle.ir.sizing.size_text import parse_size
from treadle.ir.target import Target
from treadle.ir.text.parser import parse_graph
from treadle.ir.text.scanner import TextLimits
from treadle.ir.transforms.balances import Balance
from treadle.ir.transforms.encoded_weights import decode_parameters, encode_parameters
from treadle.ir.transforms.inline import inline_calls
from treadle.ir.types import f32, parse_type
from treadle.loading import load
from treadle.models.registry import find_family
from treadle.npy_files import write_npy
from treadle.passes.budget.fitted_pipeline import MemoryLimit
from treadle.passes.cleanup.dead_code import DeadCode
from treadle.passes.framework.manager import PassManager
from treadle.passes.framework.rewrite import Rewrite
from treadle.passes.framework.rewriting import SiteRewrite
from treadle.program import backend_choice, places
from treadle.program.forms.onnx_form import OnnxForm
from treadle.program.given_texts import read_sentences
from treadle.program.program import Program
from treadle.program.source import ModelSource
from treadle.resolving import resolve
from treadle.runtime.beams import Beams
from treadle.runtime.speculation import DraftModel, PromptLookup, speculate
from treadle.sharding import shard_model
from treadle.sharding.rank_models import RankPart, _holders
from treadle.specializing import Specializing
from treadle.stepped import open_stepped
from treadle.tasks import matching, rewriting, transcribing
from treadle.tasks.answering import QuestionAnswerer
from treadle.tasks.classifying import HEAD, TextClassifier
from treadle.tasks.decoding_settings import DecodingSettings
from treadle.tasks.filling import MaskFiller
from treadle.tasks.generation_settings import FolderRules
from treadle.tasks.images.reading import ImageReader
from treadle.tasks.labelling import ImageLabeller, image_sides
from treadle.tasks.matching import ImageMatcher
from treadle.tasks.opening import OpenedModel, checked_folder
from treadle.tasks.rewriting import TextRewriter, _most_tokens
from treadle.tasks.tagging import TokenTagger
from treadle.tasks.transcribing import _converted_rules
from treadle.verifying import verify_model
from treadle.wheels.pinned_models import PINNED

SMALL: dict[str, Any] = {"vocab": 11, "dim": 12, "heads": 3, "layers": 1}
X = "graph g {{\n  symbols B\n  main(x: f32[B, 4], i: i64[B]) -> (y: f32{}) {{\n    y = {}\n    return y = y\n  }}\n}}"
STATE = """graph g {
  symbols B
  states { c: f32[3, 9, 4] }
  prefill(x: f32[B, 2, 4], i: i64[B]) -> (y: f32[B, 2, 4]) {
    %c = append(%c, x, i, i, axis=1)
    y = relu(x)
    return y = y
  }
}"""


def traced(body: Callable[[Any], Any]) -> Graph:
    @t.model
    def model(x: Annotated[t.Tensor, t.f32["B S 8"]]) -> t.Tensor:
        made: t.Tensor = body(x)
        return made

    return model.graph()


def alike(before: Any) -> str:
    return compare_memory({"peak": 4, "storages": before}, {"peak": 4, "storages": {"a": 4}})


def read(line: str, shape: str = "[B, 4]", before: str = "") -> Graph:
    return parse_graph(X.format(shape, line).replace("    y = ", f"{before}    y = "))


class Plain(StagedBackend):
    """A backend that does not plan storage."""

    name = "plain"

    def pipeline(self, target: Target) -> tuple[DeadCode, ...]:
        return (DeadCode(),)

    def emit(self, *given: Any) -> Any:
        raise NotImplementedError


class Whole:
    """A backend that compiles in one step."""

    name = "whole"
    available = supports = StagedBackend.available

    def compile(self, *given: Any) -> Any:
        return object()


def built(**options: Any) -> Any:
    return build(Plain(), read("relu(x)"), Target("cpu"), {}, **options)


@dataclass(frozen=True)
class Nameless(Op):
    name = "nameless"


@dataclass(frozen=True)
class Idle(Rewrite):
    name = "idle"


@dataclass(frozen=True)
class Sought(SiteRewrite[Any]):
    name = "sought"


@dataclass(frozen=True)
class Hollow(Composite):
    name = "hollow"


hollow: Any = Hollow()


class Narrowing(Softmax):
    def body(self, b: Builder, x: Any) -> Any:
        return x.cast("f16")


def calling(results: int) -> Graph:
    """Return a call of a block whose number of outputs has changed since."""
    graph = Graph("g")
    block = Function("block")
    graph.add_function(block)
    b = Builder(graph, block)
    x = b.input("x", "f32[2]")
    b.outputs(a=x, b=b.exp(x))
    main = Builder(graph)
    main.outputs(y=main.call(block, [main.input("x", "f32[2]")])[1])
    block.outputs |= {f"more{n}": x.value for n in range(results - 2)}
    return graph


BALANCED = """graph g {
  parameters { w: f32[8, 16] v: f32[16] g: f32[16] }
  main(x: f32[2, 16]) -> (y: f32[2, 8]) {
    r = rms_norm(x, $g)
    s = mul(r, $v)
    y = linear(s, $w)
    return y = y
  }
}"""
TWICE = """graph g {
  parameters { w: f32[8, 16] u: f32[8, 16] g: f32[16] }
  main(x: f32[2, 16]) -> (y: f32[2, 8], z: f32[2, 8]) {
    r = rms_norm(x, $g)
    e = encode(r, to=int8_rows)
    d = decode(e, of=int8_rows)
    y = linear(d, $w)
    z = linear(d, $u)
    return y = y, z = z
  }
}"""
ROUNDED = "    e = encode(x, to=int8_rows)\n    z = decode(e, of=int8_rows)\n"
ROWS = {"w": Encoding("int8_rows")}
TWO_ROWS = ROWS | {"u": Encoding("int8_rows")}
BALANCE = Balance("v", "g", None, ("w",), ("w",))
OTHER_BALANCE = replace(BALANCE, vector="o", weights=("u",))


def carrying(rows: int = 1) -> Any:
    return t.compile(MODELS["summed"]).session(rows=rows, capacity=16)


def bare(folder: Path, names: tuple[str, ...] = (), text: str = "1 / 0") -> Path:
    for name in names:
        (folder / name).write_text(f"{text}\n")
    return folder


def begun(session: Any) -> None:
    row = session.open()
    session.prefill({row: [1, 2]})
    session.verify(row, [3, 4])


quiet: Any = SimpleNamespace(doing=lambda told: None)
"""A rank that reports its activity to no other."""

opened: Any = SimpleNamespace(tokenizer=SimpleNamespace(mask=None))
"""A model of a task, whose vocabulary has no mask, whose head has three labels, and whose images are grey."""
opened.model = SimpleNamespace(
    outputs=[SimpleNamespace(name="logits", type=parse_type("f32[B, S, 3]"))],
    inputs=[Port("pixels", parse_type("f32[B, 1, 8, 8]"))],
)


def open_decoder(_: Path) -> None:
    """Open a model whose rows begin empty for rewriting."""
    made = SimpleNamespace(name="m", derived=SimpleNamespace(prologue=()))
    with patch.object(rewriting, "stepped_program", lambda program: made):
        TextRewriter.open(cast(Any, SimpleNamespace()))


fake: Any = None
"""A placeholder for a model that is unused, because the call is refused first."""


HALF, NARROW = "half \ud800", Port("k", parse_type("bf16[1]"))
TERMS: Any = SimpleNamespace(partial=("tp",), text=lambda mesh: "a sum over tp")


def writing(vocabulary: str) -> Any:
    tokenizer: Any = SimpleNamespace(vocabulary=lambda: vocabulary)
    model: Any = SimpleNamespace(name=vocabulary)
    return TextWriter(model, tokenizer, FolderRules())


REFUSED: dict[str, tuple[Callable[[Path], Any], type[TreadleError], str]] = {
    # files and arguments
    "limits": (lambda _: limits_of(CheckpointLimits, 5), UsageError, "limits must be a CheckpointLimits"),  # type: ignore[type-var]
    "a download": (lambda p: _only_file(bare(p, ("a", "b")), PINNED["minilm"]), FrontendError, "minilm"),
    "a family": (lambda _: find_family("bret"), UsageError, "there is no model 'bret' in the zoo"),
    "no family": (lambda _: find_family("zzz"), UsageError, "there is no model 'zzz' in the zoo"),
    "sentences": (lambda _: read_sentences(["a"], "f"), UsageError, "sentences were given both"),
    "no Python": (lambda p: resolve(f"{bare(p, ('m.txt',))}/m.txt:f"), UsageError, ""),
    "an import": (lambda p: resolve(f"{bare(p, ('m.py',))}/m.py:f"), FrontendError, "m.py cannot be imported"),
    "a step without weights": (lambda _: open_stepped("gpt2"), UsageError, "gpt2 is a declaration"),
    "an option of artifacts": (lambda p: load(p, memory=5), UsageError, "load does not take memory"),
    "generate": (lambda _: DecodingSettings(beams=2, draft="m", seed=1), UsageError, "a beam search does not"),
    "arrays and a file": (lambda p: write_npy(bare(p, ("f",)) / "f", {}), UsageError, "the arrays cannot be written"),
    "a file alone": (lambda p: resolve(f"{bare(p, ('m.py',))}/m.py"), UsageError, "a model in a Python file is named"),
    "syntax": (lambda p: resolve(f"{bare(p, ('m.py',), 'a b')}/m.py:f"), FrontendError, "m.py is not Python: invalid"),
    "nothing declared": (lambda p: resolve(f"{bare(p, ('m.py',), 'f = 1')}/m.py:f"), UsageError, "m.py declares no"),
    "a text's name": (lambda p: write_sections(p / "a", {HALF: b""}, {}, {}), UsageError, "a name cannot be"),
    "a value's name": (lambda p: write_sections(p / "a", {}, {}, {"name": HALF}), UsageError, "a name cannot be"),
    "another file": (lambda p: load_declaration(bare(p, ("m",)) / "m", "f"), UsageError, ""),
    "a narrow value": (lambda _: Specializing._chosen(fake, NARROW, 1), BackendError, "bf16 cannot determine"),
    "another vocabulary": (lambda _: writing("a").draft_for(writing("b")), UsageError, "a draft model must"),
    "terms": (lambda _: _holders(SimpleNamespace(devices=fake), "y", TERMS), RankError, "an output is left"),  # type: ignore[arg-type]
    "a graph's words": (lambda _: resolve(Graph("g"), inputs=["x"], dim=4), UsageError, "a graph takes no"),
    "limits by class": (
        lambda p: load(p, limits=ArtifactLimits()), UsageError, "limits= must be a mapping"
    ),
    "no Unicode": (
        lambda p: write_sections(p / "m.treadle", {"\udc80": b""}, {}, {}), UsageError, "a name cannot be written"
    ),
    # tasks
    "nothing to classify": (lambda _: TextClassifier(fake, ()).classify([]), UsageError, "there is no text to"),
    "nothing to fill": (lambda _: MaskFiller(fake, "[MASK]").fill([]), UsageError, "there is no text to fill"),
    "no token": (lambda _: MaskFiller(fake, "[MASK]").fill(["a"], top=0), UsageError, "top must be 1 or more"),
    "nothing to tag": (lambda _: TokenTagger(fake, ()).tag([]), UsageError, "there is no text to tag"),
    "a grouping": (lambda _: TokenTagger(fake, ()).tag(["a"], grouping="all"), UsageError, "there is no grouping"),
    "no question": (lambda _: QuestionAnswerer(fake).answer([("", "a")]), UsageError, "a question needs a text"),
    "no answer": (lambda _: QuestionAnswerer(fake).answer([("a", "b")], top=0), UsageError, "top and longest must"),
    "an answer of nothing": (
        lambda _: QuestionAnswerer(fake).answer([("a", "b")], longest=0), UsageError, "top and longest must"
    ),
    "no picture": (lambda _: ImageLabeller(fake, fake, (), {}).label([]), UsageError, "there is no image to label"),
    "no match": (lambda _: ImageMatcher(fake, fake, fake).match(["a"], []), UsageError, "matching needs an"),
    "a head of three": (lambda _: QuestionAnswerer.open(fake), UsageError, "a question-answering head must"),
    "a decoder alone": (open_decoder, UsageError, "m is not an encoder-decoder model"),
    "grey pictures": (lambda _: image_sides(opened.model), CheckpointError, "images must have three channels"),
    "ids that are none": (
        lambda p: _converted_rules(ModelFolder.find(bare(p, ("config.json", "model.bin"), '{"suppress_ids": [-1]}'))),
        CheckpointError,
        "suppress_ids must be a list of ids",
    ),
    "a short text": (lambda _: _most_tokens(0, fake, fake), UsageError, "a text must have 1 token or more"),
    "a file with a head": (
        lambda p: checked_folder(Program.of(str(bare(p, ("m.gguf",)) / "m.gguf")), HEAD), UsageError, "to classify"
    ),
    # the language
    "heads": (
        lambda _: traced(lambda x: t.self_attention(x, 4, kv_heads=3)), FrontendError, "4 heads do not split among"
    ),
    "tied": (lambda _: traced(lambda x: t.unembed(x, tied="wte")), FrontendError, "unembed: tied= does not name"),
    "no tensor": (lambda _: traced(lambda x: t.linear(3.0, 4)), FrontendError, "linear: x must be a tensor"),
    "no text": (lambda _: traced(lambda x: t.linear(x, 4, name=5)), FrontendError, "linear: name must be text"),
    "no number": (
        lambda _: traced(lambda x: t.layer_norm(x, eps="small")), FrontendError, "layer_norm: eps must be a number"
    ),
    "longrope": (
        lambda _: traced(lambda x: t.rotary_frequencies(4, scaling=LongRope((1.0, 1.0), (2.0, 2.0), 8))),
        FrontendError,
        "",
    ),
    "repetitions": (
        lambda _: traced(lambda x: next(x for _ in t.stack("h", -1))), FrontendError, "stack 'h' needs a number"
    ),
    "factors": (lambda _: Divided((1.0,)).apply(np.ones(4)), FrontendError, "1 factors for 4 rotary frequencies"),
    "odd dims": (lambda _: traced(lambda x: t.rotary_frequencies(7)), FrontendError, "rotary positions need an even"),
    "no base": (
        lambda _: traced(lambda x: t.rotary_frequencies(4, base=0.0)), FrontendError, "the base of rotary"
    ),
    "dynamic": (
        lambda _: traced(lambda x: t.rotary_frequencies(4, scaling=Dynamic(2.0, 8))), FrontendError, "dynamic scaling"
    ),
    "dynamic of two": (
        lambda _: traced(lambda x: t.rotary_frequencies(2, scaling=Dynamic(2.0, 8), length=16)),
        FrontendError,
        "dynamic scaling needs the sequence's length, and more than 2 dims",
    ),
    "sizes of text": (
        lambda _: traced(lambda x: t.convolution(x, 4, ("3",), name="f")), FrontendError, "convolution: kernel must be"
    ),
    "a list as a number": (
        lambda _: traced(lambda x: t.layer_norm(x, eps=[1])), FrontendError, "layer_norm: eps must be"
    ),
    "no function": (lambda _: traced(lambda x: t.mlp(x, 8, act=3)), FrontendError, "mlp: act must be a function"),
    "an option of text": (
        lambda _: t.compile(t.model(_sized), width="8"), FrontendError, "option width of model _sized must"
    ),
    "an option's name": (
        lambda _: t.compile(t.model(_sized), act="relu"), FrontendError, "option act of model _sized is a"
    ),
    "a model in a function": (lambda _: pickle.dumps(t.model(lambda x: x)), FrontendError, ""),
    # ops and graphs
    "no reference": (lambda _: Nameless().reference(), GraphError, "op nameless has no reference"),
    "no axis rule": (lambda _: Nameless().axis_rule([]), GraphError, "op nameless has no axis rule"),
    "no dtype rule": (lambda _: Nameless().dtypes(), GraphError, "op nameless has no dtype rule"),
    "no body": (lambda _: hollow.body(fake), GraphError, "composite op hollow has no body"),
    "another body": (lambda _: body_of(Narrowing(), [f32[2, 3]]), GraphError, "softmax: the types of the body"),
    "no meaning": (lambda _: Collective.combined(hollow, [], []), GraphError, "op hollow does not define `combined`"),
    "nothing begun": (lambda _: Starting.awaited.fget(hollow), GraphError, "op hollow does not define `awaited`"),
    "a call": (lambda _: interpret_function(calling(2).main, [np.ones(2)], {}), GraphError, "a call cannot be"),
    "another signature": (lambda _: inline_calls(calling(3)), GraphError, "main: a call of block does not match"),
    "an operand of a sample": (lambda _: Sample("f32[2] > 1"), GraphError, "not a sample operand: 'f32[2] > 1'"),
    "a slice of symbols": (
        lambda _: OPS["slice"].make(axis=0, start="S-4").at({"S": 2}), SizeError, "slice: S-4 is negative"
    ),
    "a slot": (
        lambda _: check_slots("append", np.array([0, 3]), 3), GraphError, "append: row 1 has slot 3, but"
    ),
    "no slot": (lambda _: check_slots("append", np.array([-1, 5]), 3), GraphError, "append: row 0 has slot -1, but"),
    "two slots": (
        lambda _: check_slots("append", np.array([*range(99), 7]), 99), GraphError, "append: two rows have the"
    ),
    "a vector's name": (
        lambda _: encode_parameters(parse_graph(BALANCED), ROWS, [BALANCE]), GraphError, "main already has a parameter"
    ),
    "two vectors": (
        lambda _: encode_parameters(parse_graph(TWICE), TWO_ROWS, [BALANCE, OTHER_BALANCE]),
        GraphError,
        "e is multiplied by two vectors before it is rounded",
    ),
    "a size without a value": (lambda _: parse_size("S+1").evaluate({"T": 3}), SizeError, "size S+1 needs a value"),
    "a state's name": (
        lambda _: parse_graph(STATE.replace("append(%c", "append(%cc")), TreadleError, "unknown state %cc"
    ),
    "numbers of rows that are rounded": (
        lambda _: decode_parameters(read("exp(z)", "[B, 4]", ROUNDED)), GraphError, "the graph encodes computed"
    ),
    "no method": (lambda _: traced(lambda x: x.sprung), GraphError, "a tensor of a model has no .sprung"),
    "items": (
        lambda _: parse_graph(X.format("[]", "reduce_sum(x, axes=[0, 1])"), TextLimits(items=1)), TreadleError, "too"
    ),
    "twice": (lambda _: op("relu", axes="... -> ...", dtypes="f -> f")(Nameless), GraphError, "op 'relu' is"),
    "a layout": (lambda _: parse_layout("panels(8, wide)"), GraphError, "unknown or repeated option 'wide'"),
    "no encoding": (lambda _: parse_encoding("4bit!"), GraphError, "not an encoding"),
    "a part of a row": (lambda _: parse_encoding("int8_rows(4)"), GraphError, "int8_rows takes no group size"),
    "a part of a row of steps": (lambda _: parse_encoding("uint8_rows(4)"), GraphError, "uint8_rows takes no group"),
    "an encoding": (lambda _: parse_encoding("int4_groups(32, axis=x)"), GraphError, "unknown or repeated option"),
    "a sample": (lambda _: Sample("f32[B, 2]").operands[0].draw(np.random.default_rng(0)), GraphError, ""),  # type: ignore[union-attr]
    "wrong sizes": (lambda _: interpret(read("relu(x)"), {"x": np.ones((2, 5)), "i": np.ones(2)}), GraphError, ""),
    "truth values": (lambda _: Builder(Graph("g")).iota(size=3, dtype="bool"), RuleError, ""),
    "results": (lambda _: read('einsum(x, equation="b k -> b, k")', "[B]"), TreadleError, ""),
    "marks": (lambda _: read('einsum(x, equation="b (k l=2) -> b k")'), TreadleError, ""),
    "weight axes": (lambda _: read('linear(x, x, weight_axes="k m")'), TreadleError, ""),
    # passes and backends
    "no pass": (lambda _: PassManager((DeadCode(),)).run(read("relu(x)")).after("fuse-gelu"), UsageError, "no pass"),
    "no pattern": (lambda _: PassManager((Idle(),)).run(read("relu(x)")), PassError, ""),
    "no sites": (lambda _: PassManager((Sought(),)).run(read("relu(x)")), PassError, ""),
    "no memory": (lambda _: built(budget=None, donate=("x",)), BackendError, "backend plain does not plan storage"),
    "no budget": (
        lambda _: built(budget=MemoryLimit(64, {"B": 2})),
        BackendError,
        "backend plain does not plan memory",
    ),
    "a budget of states": (
        lambda _: build(NumpyBackend(), parse_graph(STATE), Target("cpu"), {}, budget=MemoryLimit(64, {"B": 2})),
        UsageError,
        "budget needs a graph with one entry",
    ),
    "no plan": (
        lambda _: NumpyBackend().emit(read("relu(x)"), Target("cpu"), {}, read("relu(x)"), None),
        BackendError,
        "the numpy backend needs a storage plan",
    ),
    "a budget of one that only compiles": (
        lambda _: build(Whole(), read("relu(x)"), Target("cpu"), {}, budget=MemoryLimit(64, {"B": 2})),
        BackendError,
        "backend whole does not plan memory",
    ),
    "what one that only compiles is given": (
        lambda _: build(Whole(), read("relu(x)"), Target("cpu"), {}, donate=("x",)),
        BackendError,
        "backend whole does not plan storage",
    ),
    "states of one that knows none": (
        lambda _: build(Whole(), parse_graph(STATE), Target("cpu"), {}), BackendError, "the whole backend supports no"
    ),
    "no batch": (
        lambda _: shard_model(t.model(_rowless), "pp=2,micro=2", recipe="gpipe"), UsageError, "_rowless has no batch"
    ),
    "no sizes": (lambda _: verify_model(read("relu(x)"), sizes=[]), UsageError, "no sizes to verify at"),
    "a pipeline that writes": (
        lambda _: RankPart.of("gpt2", "pp=2", quiet, recipe="gpipe", whole=True), PassError, "a pipeline has no step"
    ),
    "memory as a text": (lambda _: alike({"a": "4"}), UsageError, "this is not the output of explain memory --json"),
    "no memory of storages": (lambda _: alike([4]), UsageError, "this is not the output of explain memory --json"),
    "an artifact's options": (
        lambda p: explain_layouts(p / "m.treadle", bias=False), UsageError, "an artifact is already compiled"
    ),
    # generation
    "no room": (lambda _: begun(t.compile("gpt2", **SMALL).session(rows=1, capacity=3)), UsageError, "row 0 has no"),
    "two inputs of tokens": (lambda _: t.compile(MODELS["packed"]).session(rows=1), UsageError, "a session needs the"),
    "no logits": (lambda _: t.compile(t.model(_headless)).session(rows=1), UsageError, "a session needs a model with"),
    "what rows bring": (lambda _: t.compile(MODELS["t5"]).session(rows=1, capacity=8), UsageError, "each row"),
    "no beams": (lambda _: Beams(0), UsageError, "count must be 1 or more"),
    "more texts than beams": (lambda _: Beams(2, best=3), UsageError, "best must be from 1 to 2"),
    "a long penalty": (lambda _: Beams(2, length_penalty=100.0), UsageError, "length_penalty must lie between"),
    "an early end": (lambda _: Beams(2, early="soon"), UsageError, "early must be"),  # type: ignore[arg-type]
    "sums that are verified": (lambda _: carrying().verify(0, [1]), UsageError, "summed has running"),
    "sums and guesses": (
        lambda _: list(speculate(carrying(), [[1]], guess=PromptLookup(), most=2)), UsageError, "summed has running"
    ),
    "a draft of sums": (lambda _: DraftModel(carrying()), UsageError, "summed has running"),
    "a draft without a text": (
        lambda _: DraftModel(t.compile("gpt2", **SMALL).session(rows=1)).follow([1], 2), UsageError, "begin must be"
    ),
    "a draft of nothing": (
        lambda _: DraftModel(t.compile("gpt2", **SMALL).session(rows=1), count=0), UsageError, "count must be 1"
    ),
}  # fmt: skip


def _headless(tokens: Annotated[t.Tensor, t.i64["B S"]]) -> t.Tensor:
    x = t.embed(tokens, 11, 12, name="wte")
    x = t.self_attention(x, 3, mask=t.causal, name="attn")
    return t.rearrange(x, pattern="b s (h d=4) -> b s h d")


def _rowless(x: Annotated[t.Tensor, t.f32["4 8"]]) -> t.Tensor:
    for _ in t.stack("h", 2):
        x = x + t.linear(x, 8, name="l")
    return x


def _sized(x: Annotated[t.Tensor, t.f32["B 8"]], *, width: int = 8, act: Any = t.relu) -> t.Tensor:
    return act(t.linear(x, width, name="l"))  # type: ignore[no-any-return]


MISSING: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    # a package, the code that needs it, and its name in messages
    "texts": ("tokenizers", lambda p: TextTokenizer.open(p), "reading text needs the package tokenizers"),
    "texts of GGUF": ("tokenizers", build_gguf_tokenizer, "reading text needs the package tokenizers"),  # type: ignore[arg-type]
    "GGUF": ("gguf", lambda _: import_gguf(), "reading GGUF files needs the package gguf"),
    "ONNX": ("onnx", lambda p: OnnxFile.open(p), "reading ONNX files needs the package onnx"),
    "ONNX export": ("onnx", lambda p: export_onnx(Graph("g"), {}, p), "ONNX export needs the package onnx"),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_package_that_is_missing_is_named_with_its_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, provoke, says = MISSING[name]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises((FrontendError, BackendError)) as caught:
        provoke(tmp_path)
    assert caught.value.what == says
    assert str(caught.value.hint) == f"pip install '.[{'text' if package == 'tokenizers' else package}]'"
    assert package in str(caught.value.received)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenedModel, "open", lambda options, head, outputs=None: opened)
    monkeypatch.setattr(rewriting, "checked_folder", lambda options, head: (None, {}))
    provoke, kind, begins = REFUSED[name]
    with pytest.raises(kind) as caught:
        provoke(tmp_path)
    assert caught.value.what.startswith(begins)


@pytest.mark.parametrize(
    ("backend", "asks", "told"),
    [
        (fake, explain_layouts, "backend odd has no passes of its own to explain"),
        (Plain(), explain_storage, "backend plain does not plan storage"),
        (Plain(), explain_memory, "backend plain does not plan storage"),
    ],
)
def test_a_backend_that_cannot_is_named(backend: Any, asks: Any, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_choice, "find_backend", lambda name: backend)
    with pytest.raises(TreadleError) as caught:
        asks("gpt2", backend=getattr(backend, "name", "odd"), **SMALL)
    assert caught.value.what == told
    assert caught.value.hint == "numpy, torch or tvm"


NEEDED: dict[str, tuple[str, Callable[[], Any], str]] = {  # the module, the code that needs it, and the message
    "starlette": ("", lambda: app(["serve", "gpt2"]), "serving needs the package starlette"),
    "pillow": ("PIL.Image", lambda: ImageReader.open(fake, "vit"), "reading images needs the package pillow"),
}


@pytest.mark.parametrize("package", NEEDED)
def test_a_package_that_is_not_there_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, asks, told = NEEDED[package]
    monkeypatch.setattr("treadle.cli.serve.find_spec", lambda name: None if name == package else name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises((TreadleError, SystemExit)) as caught:
        asks()
    error: Any = caught.value
    while not isinstance(error, TreadleError):
        error = error.__context__
    assert error.what == told
    assert "pip install '.[" in str(error.hint)


# -- refusals that need another bug first ------------------------------------------------------------------------------


def test_inputs_that_an_onnx_file_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    takes = SimpleNamespace(main=SimpleNamespace(inputs=[SimpleNamespace(name="x"), SimpleNamespace(name="y")]))
    monkeypatch.setattr("treadle.frontends.onnx_import.importer.declared_inputs", lambda *_, **__: takes)
    opened = OnnxForm("m.onnx", Path("m.onnx"))
    opened.__dict__["file"] = SimpleNamespace(proto=SimpleNamespace(graph=SimpleNamespace(input=[])), check=list)
    with pytest.raises(UsageError, match="an ONNX file has no optional inputs") as caught:
        ModelSource(opened).resolve(inputs=["x", "q", "r"])
    assert (caught.value.received, caught.value.hint) == ("q, r", "one of its inputs: x, y")


def test_a_fetched_file_of_another_format(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(places, "fetched_model", lambda name: bare(tmp_path, ("m.bin",)) / "m.bin")
    with pytest.raises(UsageError, match="minilm is in a format that Treadle cannot read") as caught:
        places.find_place("minilm")
    assert (caught.value.received, caught.value.within) == ("m.bin", str(tmp_path))


def test_an_artifact_is_run_by_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.runtime.distributed.ranks.join", lambda timeout, **_: nullcontext(fake))
    with pytest.raises(SystemExit) as ended:
        app(["run", "m.treadle", "--mesh", "tp=2"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("prologue", "positions", "what"),
    [
        (("tokens",), "f32[30, 8]", "m does not transcribe speech"),
        (("mel",), "f32[S, 8]", "the model does not state the length of its recordings"),
    ],
)
def test_a_model_that_is_no_whisper(
    prologue: tuple[str, ...], positions: str, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = {"encoder.positions.weight": SimpleNamespace(type=parse_type(positions))}
    derived = SimpleNamespace(prologue=prologue, graph=SimpleNamespace(parameters=weights))
    source = SimpleNamespace(kind="folder", tokenizer=lambda cut: fake)
    options: Any = SimpleNamespace(source=source)
    monkeypatch.setattr(transcribing, "stepped_program", lambda program: SimpleNamespace(name="m", derived=derived))
    monkeypatch.setattr(transcribing, "checked_folder", lambda options, head: (ModelFolder.find(tmp_path), {}))
    with pytest.raises((UsageError, CheckpointError)) as caught:
        transcribing.Transcriber.open(options)
    assert caught.value.what == what


def test_a_siglip_without_a_token_that_pads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def tokenizer(*, max_tokens: int, context: int | None) -> Any:
        asked.append(max_tokens)
        return SimpleNamespace(id_of=lambda name: None, special_names={})

    place, source = SimpleNamespace(path=fake), SimpleNamespace(kind="safetensors", tokenizer=tokenizer)
    made = SimpleNamespace(source=source)
    monkeypatch.setattr(matching, "compile_program", lambda program, inputs: fake)
    monkeypatch.setattr(matching, "checked_folder", lambda options, head: (place, {"model_type": "siglip"}))
    monkeypatch.setattr(matching, "image_sides", lambda made: (8, 8))
    monkeypatch.setattr(ImageReader, "open", lambda *_, **__: fake)
    for context in (None, 63, 65):
        monkeypatch.setattr(matching, "token_positions", lambda made: context)  # noqa: B023
        with pytest.raises(CheckpointError, match="the folder's vocabulary has no padding token"):
            ImageMatcher.open(made)  # type: ignore[arg-type]
    assert asked == [64, 63, 64]
