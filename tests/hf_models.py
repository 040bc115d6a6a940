"""Small random Hugging Face models: saved to a folder, and asked for what they answer to our inputs.

Every weight is drawn anew, norms and biases too, so that two of them in each other's place would show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

Array = np.ndarray[Any, Any]

VOCAB = 37

_GPT2 = {
    "vocab_size": VOCAB,
    "n_positions": 24,
    "n_embd": 24,
    "n_head": 4,
    "n_layer": 3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_BERT = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 24,
    "type_vocab_size": 3,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 40,
}
_DISTILBERT = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 24,
    "dim": 24,
    "n_heads": 4,
    "n_layers": 3,
    "hidden_dim": 40,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "d_kv": 5,
    "d_ff": 40,
    "num_heads": 4,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}


@dataclass(frozen=True)
class Tiny:
    """A class of Hugging Face's with its configuration.

    given     configuration of ours that the folder does not say
    separate  whether lm_head is a matrix of its own, although transformers 5 makes every T5 tied
    """

    architecture: str
    config: Mapping[str, Any]
    given: Mapping[str, Any] = field(default_factory=dict)
    separate: bool = False

    def build(self) -> PreTrainedModel:
        """The model in float32, in evaluation mode; the same weights each time."""
        cls = getattr(transformers, self.architecture)
        model: PreTrainedModel = cls(cls.config_class(**self.config)).eval()
        if self.separate:
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                mean = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
                weight.normal_(mean, 0.2, generator=generator)
        return model


TINY = {
    "gpt2": Tiny("GPT2LMHeadModel", _GPT2),
    "gpt2-gelu": Tiny("GPT2LMHeadModel", {**_GPT2, "n_inner": 20, "activation_function": "gelu"}),
    "bert": Tiny("BertModel", _BERT),
    "bert-pooler": Tiny("BertModel", {**_BERT, "hidden_act": "gelu_new"}, {"head": "pooler"}),
    "bert-masked-lm": Tiny("BertForMaskedLM", _BERT),
    "bert-classifier": Tiny("BertForSequenceClassification", {**_BERT, "num_labels": 5}),
    "bert-token-classifier": Tiny("BertForTokenClassification", {**_BERT, "num_labels": 3, "hidden_act": "relu"}),
    "bert-answers": Tiny("BertForQuestionAnswering", _BERT),
    "t5": Tiny("T5ForConditionalGeneration", _T5),
    "t5-gated": Tiny(
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        separate=True,
    ),
    "t5-gated-unscaled": Tiny(
        "T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    ),
    "t5-encoder": Tiny("T5EncoderModel", _T5),
    "distilbert": Tiny("DistilBertModel", _DISTILBERT),  # the example of docs/models.md, no family of ours
    "mt5": Tiny("MT5ForConditionalGeneration", _T5),
}


def save(name: str, folder: Path) -> PreTrainedModel:
    """Save a tiny model as a folder with config.json and model.safetensors; returns it."""
    model = TINY[name].build()
    model.save_pretrained(folder)
    return model


def answer(model: PreTrainedModel, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The model's outputs under our names, given inputs under our names."""
    given = {_INPUTS[n]: torch.from_numpy(x) for n, x in inputs.items() if n != "lengths"}
    if "lengths" in inputs:
        places = np.arange(inputs["tokens"].shape[1])
        given["attention_mask"] = torch.from_numpy((places < inputs["lengths"][:, None]).astype(np.int64))
    with torch.no_grad():
        out = model(**given)
    found = {ours: out[theirs].numpy() for ours, theirs in _OUTPUTS.items() if theirs in out}
    if "start_logits" in out:
        found["logits"] = np.stack([out["start_logits"].numpy(), out["end_logits"].numpy()], axis=-1)
    return {"logits": found["logits"]} if "logits" in found else found


_INPUTS = {"tokens": "input_ids", "decoder_tokens": "decoder_input_ids", "token_types": "token_type_ids"}
_OUTPUTS = {"logits": "logits", "hidden": "last_hidden_state", "pooled": "pooler_output"}
