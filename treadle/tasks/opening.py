"""Open a task's model: check that the folder's class has the head, and read the labels from config.json.

opened = OpenedModel.open("folder", CLASSIFYING, backend="tvm")
for row, logits in enumerate(opened.run(opened.tokenizer.encode(texts))): ...
"""

from __future__ import annotations

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
from treadle.models.registry import family_of
from treadle.passes.stepping.table_rows import context_of
from treadle.program.program import Program
from treadle.program.trained_folders import CONFIG
from treadle.tasks.batching import batches_by_length
from treadle.tasks.fitted_tokenizers import fit_tokenizer, no_tokens

Floats = npt.NDArray[np.float32]

BATCH = 32
"""Maximum number of rows per batch."""


@dataclass(frozen=True)
class Head:
    """The head that a task needs.

    does   the task as a phrase for error messages: "classify texts"
    ends   suffixes of the names of the Hugging Face classes that have this head
    logits the output `logits` of a declaration that has this head, as its axes: ("B", "S", "vocab"), where a number
           is a size; empty: tasks of this head need a checkpoint of these classes
    needs_names  True if config.json must have the names of a declaration's labels; otherwise they are numbers
    fetched  a model with this head that can be fetched; "": none
    """

    does: str
    ends: tuple[str, ...]
    logits: tuple[str, ...] = ()
    needs_names: bool = False
    fetched: str = ""

    @property
    def folders(self) -> str:
        """The folders that have this head, for the hint of an error."""
        first = f"{self.fetched}, after `treadle fetch {self.fetched}`; or " if self.fetched else ""
        return f"{first}a folder of a class whose name ends in {' or '.join(self.ends)}"


@dataclass(frozen=True)
class OpenedModel:
    """A compiled encoder with its tokenizer.

    name       the model's name
    config     the contents of config.json; for a declaration, id2label is added if there is none
    model      the compiled model, with inputs tokens, lengths, and token_types if the model distinguishes segments. A
               declaration may lack lengths
    tokenizer  the tokenizer, which truncates texts to the model's maximum length
    """

    name: str
    config: Mapping[str, Any]
    model: Compiled
    tokenizer: TextTokenizer

    @classmethod
    def open(cls, program: Program, head: Head, outputs: Sequence[str] | None = None) -> OpenedModel:
        """Compile a folder's model, a fetched model, or a declaration with weights.

        outputs   the outputs to compute; `logits[:, asked]` are the logits at the positions that `run` gets. None: all
                  outputs

        Raises UsageError if the model has no such head, CheckpointError if a file is missing or damaged, and the errors
        of `compile`.
        """
        if program.source.kind in DECLARED:
            declared, config = _checked_declaration(program, head)
        else:
            _, config = checked_folder(program, head)
            declared = family_of(config).read(config).model
        optional = {given.name for given in declared.declared_inputs if given.optional} if declared else set()
        inputs = ["lengths"] if program.source.kind not in DECLARED or "lengths" in optional else []
        if "token_types" in optional and config.get("type_vocab_size", 2) != 1:
            inputs.append("token_types")
        made = compile_program(program, inputs, outputs)
        tokenizer = program.source.tokenizer(context=token_positions(made))
        return cls(made.name, config, made, fit_tokenizer(tokenizer, program.source, made.graph.main))

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


def trained_in_python(error: UsageError) -> UsageError:
    """Return the error for a declaration without weights, with a hint for a model that `treadle train` cannot train: it
    trains logits over the vocabulary.
    """
    how = "whose weights `t.Trainer` has trained: docs/own-models.md"
    error.hint = Hint(f'weights="FOLDER", {how}', f"--weights FOLDER, {how}")
    return error


def _checked_declaration(program: Program, head: Head) -> tuple[Model | None, Mapping[str, Any]]:
    """Return a declaration with its configuration, and the config.json of its weights; None for a graph. Raises
    UsageError if it has no weights, or if its inputs and outputs are not those of the head.
    """
    source = program.source
    resolved = program.declared(deferred=True).resolved
    takes = {value.name: value.type for value in resolved.graph.main.inputs}
    gives = {name: value.type for name, value in resolved.graph.main.outputs.items()}
    logits, tokens = gives.get("logits"), takes.get("tokens")
    shown = f"logits [{', '.join(head.logits)}]"
    if (
        logits is None
        or tokens is None
        or tokens.rank != 2
        or {*takes} - {"tokens", "lengths"}
        or logits.rank != len(head.logits)
        or logits.shape[:-1] != tokens.shape[: logits.rank - 1]
        or logits.shape[-1].constant is None
        or (head.logits[-1].isdigit() and logits.shape[-1].constant != int(head.logits[-1]))
    ):
        ports = (f"({', '.join(f'{name}: {type}' for name, type in of.items())})" for of in (takes, gives))
        raise UsageError(
            f"{printable(source.label)} has no head to {head.does}",
            received=" -> ".join(ports),
            hint=f"a declaration with input tokens [B, S] and output {shown}, or {head.folders}",
        )
    if not source.has_weights:
        error = source.without_weights()
        is_declared = source.kind == "declaration"
        raise trained_in_python(error) if is_declared and head.logits[-1] != "vocab" else error
    folder = None if source.path is None else source.folder
    config = folder.config if folder is not None and folder.has(CONFIG) else {}
    if head.needs_names and "id2label" not in config:
        names = '"id2label": {"0": "O", "1": "B-name", "2": "I-name"}, with the name of each label'
        raise UsageError(
            f"the labels of {printable(source.label)} have no names",
            received=f"logits: {logits}",
            within=None if folder is None else folder.show(CONFIG),
            hint=names if folder is not None else Hint(f'weights="FOLDER", whose config.json has {names}', names),
        )
    numbers = {str(number): str(number) for number in range(logits.shape[-1].constant)}
    return resolved.model, {"id2label": numbers, **config}


def checked_folder(program: Program, head: Head) -> tuple[ModelFolder, Mapping[str, Any]]:
    """Return the folder that MODEL names, and its config.json. Raises UsageError if its class lacks the head, or if
    MODEL is not a folder.
    """
    source = program.source
    if head.logits and source.kind == "artifact":
        hint = Hint(
            "the model that it was compiled from, such as t.load('FILE.py:FUNCTION', weights='FOLDER')",
            "the model that it was compiled from, such as FILE.py:FUNCTION --weights FOLDER",
        )
        raise UsageError(f"to {head.does} needs the model itself, not an artifact", received=source.label, hint=hint)
    if source.kind in _NO_FOLDERS:
        label, hint = printable(source.label), Hint(head.folders, head.folders)
        if source.kind == "graph":
            hint = Hint(f"{hint}; t.compile(model) takes arrays", str(hint))
        elif source.kind == "declaration" and str(source.path) != source.label:
            hint = Hint(
                f"{hint}; t.compile({source.label!r}) runs the declaration on arrays",
                f"{hint}; `treadle run {label} --input NAME=FILE.npy` runs the declaration on arrays",
            )
        what = f"to {head.does} needs a checkpoint folder, not {_NO_FOLDERS[source.kind]}"
        raise UsageError(what, received=label, hint=hint)
    if not source.place.is_dir():
        raise UsageError(
            f"to {head.does} needs a folder with config.json", received=source.place.name, hint=head.folders
        )
    config = source.config
    named = config.get("architectures")
    classes = [str(name) for name in named] if isinstance(named, list) else []
    if not any(name.endswith(head.ends) for name in classes):
        raise UsageError(
            f"{printable(source.label)} has no head to {head.does}",
            received=", ".join(map(printable, classes)) or "config.json names no class",
            hint=head.folders,
        )
    return source.folder, config


DECLARED = ("declaration", "graph")
"""The kinds of models whose outputs decide the tasks that they support."""
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
