"""A folder with config.json and safetensors files, in CTranslate2's layout, or with weights of a declaration."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, TypeGuard

from treadle.frontends.ctranslate2_file import CTranslate2File, find_ctranslate2
from treadle.frontends.huggingface import open_checkpoint
from treadle.frontends.quantized.quantized_checkpoint import open_quantized
from treadle.models.checkpoints import ReadModel, ReadOptions, read_checkpoint, read_ctranslate2
from treadle.models.family import Family, ReadConfig
from treadle.models.registry import family_of
from treadle.program.forms.declaration_form import DeclarationForm
from treadle.program.forms.model_form import Kind, ModelForm
from treadle.program.image_inputs import ImageModel
from treadle.program.trained_folders import CONFIG, DeclarationReference


class FolderForm(ModelForm):
    """A folder with config.json and safetensors files, in CTranslate2's layout, or with weights of a declaration."""

    @cached_property
    def converted(self) -> CTranslate2File | None:
        return find_ctranslate2(self.folder)

    @cached_property
    def stored(self) -> DeclarationReference | None:
        """The reference to a declaration, if the folder has weights of one."""
        return DeclarationReference.read(self.folder)

    @cached_property
    def declared(self) -> DeclarationForm | None:
        """The declaration of the zoo to whose weights the folder belongs; None for another folder.

        Raises UsageError if the declaration is in a Python file, which only the user may name.
        """
        if self.stored is None:
            return None
        if not self.stored.is_family:
            raise self.stored.needs_file(self.label)
        return DeclarationForm(self.label, self.stored.family, None, self.place, self.limits)

    @property
    def kind(self) -> Kind:
        if self.stored is not None:
            return "declaration"
        return "safetensors" if self.converted is None else "ctranslate2"

    @cached_property
    def meaning(self) -> tuple[Family, ReadConfig]:
        family = family_of(self.config)
        return family, family.read(self.config)

    @property
    def config(self) -> Mapping[str, Any]:
        return open_checkpoint(self.folder).config if self.declared is None else self.folder.config

    @property
    def positions(self) -> int | None:
        return None if self.converted is not None else config_positions(self.config)

    @property
    def image_model(self) -> ImageModel | None:
        if self.kind != "safetensors":
            return None
        family, read = self.meaning
        named = int(self.config.get("image_token_id", self.config.get("image_token_index", -1)))
        token = named if named >= 0 else None
        return ImageModel(family.name, read.model.config, token, None, self.folder.show(CONFIG))

    def refuse_unsupported(self) -> None:
        if self.declared is None and self.converted is None:
            self.meaning  # noqa: B018
            open_quantized(open_checkpoint(self.folder))

    def read(self, options: ReadOptions) -> ReadModel:
        if self.declared is not None:
            return self.declared.read(options)
        if self.converted is not None:
            return read_ctranslate2(self.converted, options)
        return read_checkpoint(open_checkpoint(self.folder), *self.meaning, options)


def config_positions(config: Mapping[str, Any]) -> int | None:
    """Return the number of positions that a config.json declares.

    Linear and dynamic rotary scaling extend the declared number by their factor. With Llama 3's and LongRoPE scaling,
    the declared number is the extended one; YaRN extends the original number, if the file has it, as in vLLM.
    """
    most, scaling = config.get("max_position_embeddings"), config.get("rope_scaling") or config.get("rope_parameters")
    if not _is_count(most):
        return None
    if not isinstance(scaling, Mapping):
        return most
    factor, kind = scaling.get("factor"), scaling.get("rope_type", scaling.get("type"))
    if kind in ("llama3", "longrope", "su") or not isinstance(factor, int | float) or not 1 < factor < most:
        return most
    original = scaling.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    return int((original if kind == "yarn" and _is_count(original) else most) * factor)


def _is_count(number: Any) -> TypeGuard[int]:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1
