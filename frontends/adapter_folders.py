"""Folders with an adapter: changes of a model's weights, in PEFT's layout, without the model.

    folder/adapter_config.json              the kind of the adapter, and its model
    folder/adapter_model.safetensors

Treadle reads models. The package peft merges an adapter into its model. Source: `PeftModel.save_pretrained` and
`AutoPeftModel` of Hugging Face PEFT.
"""

from __future__ import annotations

from treadle.files.shown_names import printable
from treadle.frontends.model_folder import ModelFolder
from treadle.ir.errors import CheckpointError

_CONFIG = "adapter_config.json"
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
"""Kinds of adapters that change a model's inputs, and so cannot be merged into its weights."""
_TASKS = {
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
}
"""The end of the class of PEFT that opens an adapter, by its task."""


def adapter_error(place: ModelFolder) -> CheckpointError | None:
    """Return the error for a folder with an adapter in place of a model; None for other folders. Raises CheckpointError
    if the adapter's configuration is damaged.
    """
    if not place.has(_CONFIG):
        return None
    settings = place.read_settings(_CONFIG)
    kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    named = printable(base) if isinstance(base, str) and base else "a model that it does not name"
    shown = printable(kind) if isinstance(kind, str) else "unknown kind"
    return CheckpointError(
        "the folder has an adapter, which changes the weights of a model, and no model",
        received=f"an adapter ({shown}) of {named}",
        within=place.show(_CONFIG),
        hint=f"{named} alone: this kind of adapter cannot be merged into weights"
        if kind in _PROMPTS
        else _merging(place.shown, base, str(settings.get("task_type"))),
    )


def _merging(folder: str, base: object, task: str) -> str:
    """Return the hint to merge an adapter into its model."""
    opener = f"AutoPeftModel{_TASKS.get(task, '')}"
    tokenizer = base if isinstance(base, str) and base else folder
    return (
        "merge it into its model, in Python with the package peft, and name the folder merged:\n"
        f"from peft import {opener}\n"
        f"{opener}.from_pretrained({folder!r}).merge_and_unload().save_pretrained('merged')\n"
        "from transformers import AutoTokenizer\n"
        f"AutoTokenizer.from_pretrained({tokenizer!r}).save_pretrained('merged')"
    )
