"""Open a task's model: check that the folder's class has the head, and read the labels from config.json.

opened = OpenedModel.open("folder", CLASSIFYING, backend="tvm")
for row, logits in enumerate(opened.run(opened.tokenizer.encode(texts))): ...
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from treadle.compiled import Compiled
from treadle.compiling import compile_program
from treadle.files.shown_names import printable
from treadle.frontends.declarations import Model
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.text import EncodedText, TextTokenizer
from treadle.ir.errors import CheckpointError, Hint, UsageError
from treadle.ir.graph import Graph
from treadle.models.registry import family_of
from treadle.passes.stepping.table_rows import context_of
from treadle.program.forms.artifact_form import ArtifactForm
from treadle.program.program import Program
from treadle.program.source import ModelSource
from treadle.program.trained_folders import CONFIG
from treadle.tasks.batching import batches_by_length
from treadle.tasks.fitted_tokenizers import fit_tokenizer, no_tokens
from treadle.tasks.heads import HEADS, Head, classes_of, task_of

Floats = npt.NDArray[np.float32]

BATCH = 32
"""Maximum number of rows per batch."""


@dataclass(frozen=True)
class OpenedModel:
    """A compiled encoder with its tokenizer.

    name       the model's name
    config     the contents of config.json; for a declaration, id2label is added if there is none
    model      the compiled model, with inputs tokens, lengths, and token_types if the model distinguishes segments. A
               declaration and an artifact may lack them
    tokenizer  the tokenizer, which truncates texts to the model's maximum length
    lacks_types  True for an artifact of a model that distinguishes segments, without the input token_types
    """

    name: str
    config: Mapping[str, Any]
    model: Compiled
    tokenizer: TextTokenizer
    lacks_types: bool = False

    @classmethod
    def open(cls, program: Program, head: Head, outputs: Sequence[str] | None = None) -> OpenedModel:
        """Compile a folder's model, a fetched model, or a declaration with weights; or load an artifact.

        outputs   the outputs to compute; `logits[:, asked]` are the logits at the positions that `run` gets. None: all
                  outputs

        Raises UsageError if the model has no such head, CheckpointError if a file is missing or damaged, and the errors
        of `compile`.
        """
        source = program.source
        if source.kind == "graph":  # rows are not padded, so a mask of padding is not needed
            source = source.for_text()
            program = Program(source, program.options)
        by_outputs = outputs_decide(source)
        if by_outputs:
            declared, config = _checked_outputs(program, head)
        else:
            _, config = checked_folder(program, head)
            declared = family_of(config).read(config).model
            _check_artifact(source, head)
        optional = {given.name for given in declared.declared_inputs if given.optional} if declared else set()
        has_types = "token_types" in optional and config.get("type_vocab_size", 2) != 1
        inputs = ["lengths"] if not by_outputs or "lengths" in optional else []
        made = compile_program(program, inputs + ["token_types"] * has_types, outputs)
        tokenizer = fit_tokenizer(source.tokenizer(context=token_positions(made)), source, made.graph.main)
        lacks_types = has_types and all(port.name != "token_types" for port in made.inputs)
        return cls(made.name, config, made, tokenizer, lacks_types)

    def run(
        self, texts: Sequence[EncodedText], *, output: str = "logits", asked: Sequence[Sequence[int]] | None = None
    ) -> Iterator[tuple[int, Floats]]:
        """Run the model in batches. Yield (index of the text, the text's row of the output), in any order. A row of an
        output [B, S, ...] is sliced to the text's length.

        asked   for each text the positions to compute, at least one, if the model was opened with such an output

        Raises UsageError for a text without tokens.
        """
        takes = {port.name for port in self.model.inputs}
        for number, text in enumerate(texts):
            if not len(text):
                raise no_tokens(number, len(texts))
            if self.lacks_types and any(text.types):
                raise without_input(self.name, "token_types, by which the model distinguishes two texts", "token_types")
        for chosen in batches_by_length([len(text) for text in texts], BATCH if "lengths" in takes else 1):
            lengths = np.array([len(texts[i]) for i in chosen], np.int64)
            tokens = np.zeros((len(chosen), int(lengths.max())), np.int64)
            types = np.zeros_like(tokens)
            for row, number in enumerate(chosen):
                tokens[row, : lengths[row]] = texts[number].ids
                types[row, : lengths[row]] = texts[number].types
            counts = lengths
            given = {"tokens": tokens, "lengths": lengths, "token_types": types}
            if asked is not None:
                counts = np.array([len(asked[i]) for i in chosen], np.int64)
                most = int(counts.max())
                given["asked"] = np.array(
                    [[*asked[i], *[asked[i][0]] * (most - len(asked[i]))] for i in chosen], np.int64
                )
            out = np.asarray(self.model(**{name: x for name, x in given.items() if name in takes})[output])
            for row, number in enumerate(chosen):
                yield number, out[row, : counts[row]] if out.ndim == 3 else out[row]


def without_input(name: str, lacking: str, *inputs: str) -> UsageError:
    """Return the error for an artifact without an optional input that a task needs.

    lacking   the input, with its purpose
    inputs    the names of the inputs to compile it with, besides lengths
    """
    names = ("lengths", *inputs)
    return UsageError(
        f"the artifact of {name} has no input {lacking}",
        hint=Hint(
            f"compile it again, with inputs={[*names]}",
            f"treadle compile MODEL --inputs {','.join(names)} -o FILE.treadle",
        ),
    )


def trained_in_python(error: UsageError) -> UsageError:
    """Return the error for a declaration without weights, with a hint for a model that `treadle train` cannot train: it
    trains logits over the vocabulary.
    """
    how = "whose weights `t.Trainer` has trained: docs/own-models.md"
    error.hint = Hint(f'weights="FOLDER", {how}', f"--weights FOLDER, {how}")
    return error


def outputs_decide(source: ModelSource) -> bool:
    """Return True for a model whose inputs and outputs decide the tasks for texts that it supports."""
    return source.kind in ("declaration", "graph") or (source.kind == "artifact" and not _has_classes(source))


def _has_classes(source: ModelSource) -> bool:
    return source.kind == "artifact" and source.folder.has(CONFIG) and bool(classes_of(source.config))


def _check_artifact(source: ModelSource, head: Head) -> None:
    """Raise UsageError for an artifact whose inputs and outputs are not those of the head."""
    if isinstance(source.form, ArtifactForm) and not head.is_on(source.form.content.optimized.graph):
        raise _without_head(source, head, source.form.content.optimized.graph)


def _without_head(source: ModelSource, head: Head, graph: Graph) -> UsageError:
    takes = {value.name: value.type for value in graph.main.inputs}
    gives = {name: value.type for name, value in graph.main.outputs.items()}
    ports = (f"({', '.join(f'{name}: {type}' for name, type in of.items())})" for of in (takes, gives))
    shown = f"logits [{', '.join(head.logits)}]"
    return UsageError(
        f"{printable(source.label)} has no head to {head.does}",
        received=" -> ".join(ports),
        hint=f"a declaration with input tokens [B, S] and output {shown}, or {head.folders}",
    )


def _checked_outputs(program: Program, head: Head) -> tuple[Model | None, Mapping[str, Any]]:
    """Return a declaration with its configuration, and the config.json of its weights; None for a graph and for an
    artifact. Raises UsageError if it has no weights, or if its inputs and outputs are not those of the head.
    """
    source, model = program.source, None
    if isinstance(source.form, ArtifactForm):
        graph = source.form.content.optimized.graph
    else:
        resolved = program.declared(deferred=True).resolved
        graph, model = resolved.graph, resolved.model
    if not head.is_on(graph):
        raise _without_head(source, head, graph)
    if not source.has_weights:
        error = source.without_weights()
        is_declared = source.kind == "declaration"
        raise trained_in_python(error) if is_declared and head.logits[-1] != "vocab" else error
    folder = None if source.path is None else source.folder
    config = folder.config if folder is not None and folder.has(CONFIG) else {}
    logits = graph.main.outputs["logits"].type
    if head.needs_names and "id2label" not in config:
        names = '"id2label": {"0": "O", "1": "B-name", "2": "I-name"}, with the name of each label'
        raise UsageError(
            f"the labels of {printable(source.label)} have no names",
            received=f"logits: {logits}",
            within=None if folder is None else folder.show(CONFIG),
            hint=names if folder is not None else Hint(f'weights="FOLDER", whose config.json has {names}', names),
        )
    numbers = {str(number): str(number) for number in range(logits.shape[-1].constant or 0)}
    return model, {"id2label": numbers, **config}


def checked_folder(program: Program, head: Head) -> tuple[ModelFolder, Mapping[str, Any]]:
    """Return the folder that MODEL names, and its config.json. Raises UsageError if its class lacks the head, or if
    MODEL is not a folder.
    """
    source = program.source
    if source.kind in _NO_FOLDERS and not _has_classes(source):
        label, hint = printable(source.label), Hint(head.folders, head.folders)
        if source.kind == "graph":
            hint = Hint(f"{hint}; t.compile(model) takes arrays", str(hint))
        elif source.kind == "declaration" and str(source.path) != source.label:
            hint = Hint(
                f"{hint}; t.compile({source.label!r}) runs the declaration on arrays",
                f"{hint}; `treadle run {shlex.quote(label)} --input NAME=FILE.npy` runs the declaration on arrays",
            )
        what = f"to {head.does} needs a checkpoint folder, not {_NO_FOLDERS[source.kind]}"
        raise UsageError(what, received=label, hint=hint)
    if source.kind != "artifact" and not source.place.is_dir():
        raise UsageError(
            f"to {head.does} needs a folder with config.json", received=source.place.name, hint=head.folders
        )
    is_converted = source.kind == "ctranslate2"  # without config.json; only Whisper is read in this layout
    config: Mapping[str, Any] = {"architectures": [*HEADS["transcribe"].ends]} if is_converted else source.config
    if is_converted or not head.is_of(config):
        received = ", ".join(map(printable, classes_of(config))) or "config.json names no class"
        raise UsageError(
            f"{printable(source.label)} has no head to {head.does}",
            received="a folder in CTranslate2's layout" if is_converted else received,
            hint=_own_task(source.label, config, head),
        )
    return source.folder, config


def _own_task(label: str, config: Mapping[str, Any], head: Head) -> str:
    """Return the hint for a folder without a head: the task of its own class, and the folders that have the head."""
    task = task_of(config)
    if task is None:
        return head.folders
    command = f"treadle {task} {shlex.quote(printable(label))}, the task of its class"
    return Hint(
        f"t.load({printable(label)!r}).{task}(...), the task of its class; or {head.folders}",
        f"{command}; or {head.folders}",
    )


_NO_FOLDERS = {"declaration": "a declaration", "graph": "a graph", "artifact": "an artifact"}
"""The kinds of models that have no configuration of a head."""


def read_labels(config: Mapping[str, Any], model: Compiled | None = None) -> tuple[str, ...]:
    """Return the names of a head's labels, in the order of their indices: config.json's id2label.

    model  a model whose output `logits` has a number for each label

    Raises CheckpointError unless id2label is an object whose keys are the indices from 0 on, and whose values are
    names, as many as the model has labels.
    """
    found = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})
    if not isinstance(found, Mapping) or not found or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError("config.json: id2label must be an object with a name per label", received=_shown(found))
    if sorted(found) != sorted(map(str, range(len(found)))):
        raise CheckpointError("config.json: id2label must name the labels from 0 on", received=_shown(list(found)))
    counts = [port.type.shape[-1].constant for port in (model.outputs if model else ()) if port.name == "logits"]
    if any(count not in (None, len(found)) for count in counts):
        raise CheckpointError(
            "config.json: id2label must name all labels of the model",
            received=f"{len(found)} names, {counts[0]} labels",
        )
    return tuple(found[str(number)] for number in range(len(found)))


def _shown(value: object) -> str:
    return printable(repr(value), 200)


def token_positions(model: Compiled, name: str = "tokens") -> int | None:
    """Return the maximum number of tokens of a row, or None if the model has no limit. `name` is the input's name."""
    tokens = next(port for port in model.inputs if port.name == name)
    symbol = tokens.type.shape[-1].as_symbol
    return None if symbol is None else context_of(model.graph, symbol)
