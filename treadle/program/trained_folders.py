"""The folder of a trained declaration: config.json refers to the declaration of its weights.

    {"model_type": "treadle",
     "declaration": {"file": "models.py", "function": "my_gpt", "file_sha256": "…", "graph_sha256": "…",
                     "config": {"layers": 4}},
     "eos_token_id": 0}

A declaration is Python code. A folder never runs it: the user names the file, and the folder as its weights. The
weights of a family of the zoo, `{"family": "gpt2", "config": {...}}`, need no file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from treadle.files.contained_files import read_regular
from treadle.files.shown_names import printable, shown_path
from treadle.frontends.declarations import Model
from treadle.frontends.dsl import MOST_REPETITIONS
from treadle.frontends.model_folder import ModelFolder
from treadle.frontends.neighbor_modules import neighbors_of
from treadle.ir.errors import CheckpointError, Hint, TreadleError, UsageError
from treadle.ir.hashing import structural_hash
from treadle.models.registry import family_names, find_family
from treadle.program.flag_values import as_json, config_value

CONFIG, KIND = "config.json", "treadle"
"""The file with the reference, and its `model_type`."""

_KEY = "declaration"
_FILE_BYTES = 16 << 20
_DIGEST, _FILE = re.compile(r"[0-9a-f]{64}"), re.compile(r"[^-].{0,1000}\.py")


@dataclass(frozen=True)
class DeclarationReference:
    """The declaration of a folder's weights.

    function      its name; for a family of the zoo, the family's name
    file          the Python file as the user named it, without the folders of an absolute path; None for a family, and
                  for a declaration that no file has
    file_sha256   SHA-256 of the file and of the modules beside it that it imports, in hexadecimal
    graph_sha256  structural hash of its graph (`treadle.ir.hashing`), with the configuration
    config        configuration that differs from the declaration's defaults
    """

    function: str
    file: str | None = None
    file_sha256: str | None = None
    graph_sha256: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model, label: str, file: Path | None) -> DeclarationReference:
        """Return the reference to a configured declaration.

        label  its name in messages: "models.py:my_gpt"
        file   its Python file, if it has one
        """
        if family_of_declaration(model) is not None:
            return cls(model.name, config=model.config)
        named, colon, function = label.rpartition(":")
        shown = None if file is None else named if colon and not os.path.isabs(named) else file.name
        graph = _graph_digest(model, {})
        return cls(function or model.name, shown, _digest(model, file), graph, model.config)

    @classmethod
    def read(cls, folder: ModelFolder) -> DeclarationReference | None:
        """Return the reference in a folder's config.json; None if there is none. Raises CheckpointError for a damaged
        one.
        """
        if not folder.has(CONFIG) or folder.config.get("model_type") != KIND:
            return None
        found = folder.config.get(_KEY)
        shown = folder.show(CONFIG)
        said = found if isinstance(found, Mapping) else {}
        config, file = said.get("config", {}), said.get("file")
        name = said.get("family", said.get("function"))
        digests = [said.get("file_sha256"), said.get("graph_sha256")]
        is_whole = (
            isinstance(name, str)
            and (name in family_names() if "family" in said else name.isidentifier())
            and isinstance(config, Mapping)
            and (file is None or (isinstance(file, str) and _FILE.fullmatch(file) and file.isprintable()))
            and all(each is None or (isinstance(each, str) and _DIGEST.fullmatch(each)) for each in digests)
            and ("family" in said or digests[1] is not None)
            and not any("layers" in key and isinstance(n, int) and n > MOST_REPETITIONS for key, n in config.items())
        )
        if not is_whole:
            raise CheckpointError(
                "config.json does not name the declaration of the folder's weights",
                received=f"{_KEY}: {printable(repr(found))}",
                within=shown,
                hint="train the model again, or restore the file",
            )
        values = {key: config_value(value) for key, value in config.items()}
        return cls(str(name), file, digests[0], digests[1], values)

    @property
    def is_family(self) -> bool:
        """True for a family of the zoo, which needs no file."""
        return self.graph_sha256 is None

    @property
    def label(self) -> str:
        """The declaration as a command names it: "models.py:my_gpt"."""
        return self.function if self.file is None else f"{self.file}:{self.function}"

    @property
    def family(self) -> Model:
        """The declaration of a family of the zoo, configured."""
        return find_family(self.function).model.configure(**self.config)

    def record(self) -> dict[str, Any]:
        """Return config.json's entries."""
        if self.is_family:
            said: dict[str, Any] = {"family": self.function}
        else:
            digests = {"file_sha256": self.file_sha256, "graph_sha256": self.graph_sha256}
            said = {"file": self.file, "function": self.function, **digests}
        said["config"] = as_json(self.config)
        return {"model_type": KIND, _KEY: {key: value for key, value in said.items() if value is not None}}

    def check(self, model: Model, file: Path | None, folder: ModelFolder, weights: str) -> None:
        """Raise CheckpointError if a declaration is not the one that the folder refers to.

        An unchanged file is the same declaration. Of a changed or another file, the graph is compared.

        weights  the name of the folder's weight file, for the hint
        """
        received: str | None
        recorded = self.function if self.is_family else self.graph_sha256
        if self.is_family:
            received = family_of_declaration(model)
        elif self.function == model.name and self.file_sha256 is not None and _digest(model, file) == self.file_sha256:
            return
        else:
            received = _graph_digest(model, self.config)
        if received == recorded:
            return
        path = os.path.join(folder.shown, weights)
        named = model.name if file is None else f"{shown_path(file)}:{model.name}"
        was = "" if self.is_family else f"{self.label}: "
        same = "the file as it was then" if self.function == model.name else self.label
        raise CheckpointError(
            f"{named} is not the declaration with which these weights were trained",
            received=f"{_short(received or 'not of the zoo')}, recorded {was}{_short(str(recorded))}",
            within=folder.show(CONFIG),
            hint=Hint(
                f"{same}, or weights={path!r}, which is read without the comparison",
                f"{same}, or --weights {path}, which is read without the comparison",
            ),
        )

    def needs_file(self, folder: str) -> UsageError:
        """Return the error for a folder, as the user named it, that is opened without the declaration."""
        words, instead = (self.label, "--weights", folder), f"weights={folder!r} in place of {folder!r}"
        if self.file is None:
            hint = Hint(
                f"{self.function}, {instead}",
                f"write {self.function} to a file, and name FILE.py:{self.function} --weights {shown_path(folder)}",
            )
        else:
            hint = Hint(
                f"{self.label!r}, {instead}",
                f"{self.label} --weights {shown_path(folder)}",
                replaces=folder,
                words=words,
            )
        return UsageError(
            f"{shown_path(folder)} has the weights of {self.label}, a declaration in Python",
            received="a folder alone, which never runs code",
            hint=hint,
        )


def family_of_declaration(model: Model) -> str | None:
    """Return the family of the zoo that a declaration is; None if it is the user's own."""
    is_family = model.name in family_names() and find_family(model.name).model.function is model.function
    return model.name if is_family else None


def _short(text: str) -> str:
    return f"graph {text[:12]}" if _DIGEST.fullmatch(text) else text


def _graph_digest(model: Model, config: Mapping[str, Any]) -> str:
    """Return the structural hash of a declaration's graph, or the reason why it has none."""
    try:
        return structural_hash(model.configure(inputs=(), **config).graph())
    except TreadleError as error:
        return error.what


def _digest(model: Model, file: Path | None) -> str | None:
    """Return the SHA-256 of a declaration's file, followed by the modules beside it that it imports."""
    if file is None:
        return None
    beside = neighbors_of(model.function)
    files = [file, *(sorted(beside.files) if beside is not None else ())]
    return sha256(b"".join(read_regular(each, _FILE_BYTES, str(each)) for each in files)).hexdigest()
