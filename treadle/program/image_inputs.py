"""A description of a model that reads images, from its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ImageModel:
    """A model that reads images: the facts that its prompts and its images depend on.

    family   the name of its family
    config   the configuration of its declaration
    token    the id of the image token; None if no file names it, so that it is looked up under its usual name
    options  the options of its image processor, by the names in preprocessor_config.json; None: the folder has them
    file     the name in errors of the file with these facts
    """

    family: str
    config: Mapping[str, Any]
    token: int | None
    options: Mapping[str, Any] | None
    file: str
