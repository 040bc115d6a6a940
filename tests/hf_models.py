"""Small random Hugging Face models: saved to a folder, and run on our inputs for reference answers.

Every weight is drawn separately, norms and biases too, so that two swapped weights would show.
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
_ROBERTA = {
    **_BERT,
    "vocab_size": VOCAB + 1,
    "pad_token_id": VOCAB,  # never drawn, because Hugging Face numbers positions by the non-padding tokens
    "max_position_embeddings": VOCAB + 1 + 24,
}
_ALBERT = {**_BERT, "embedding_size": 10, "num_hidden_layers": 4}
_ELECTRA = {**_BERT, "embedding_size": 10}
_MPNET = {**_BERT, "max_position_embeddings": 26}  # two rows are for padding
del _MPNET["type_vocab_size"]
_MODERNBERT = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "intermediate_size": 20,
    "local_attention": 6,
    "pad_token_id": 0,
}
_PADDED_GPT2 = {**_GPT2, "vocab_size": VOCAB + 1, "pad_token_id": VOCAB}
_BIOGPT = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 24,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 40,
}
_VIT = {
    "image_size": [12, 8],
    "patch_size": 4,
    "num_channels": 2,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 40,
}
_DINOV2 = {
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 2,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "mlp_ratio": 2,
}
_CLIP_VISION = {**_VIT, "image_size": 12}
_CLIP_TEXT = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 24,
    "hidden_size": 20,
    "num_attention_heads": 5,
    "num_hidden_layers": 2,
    "intermediate_size": 30,
    "bos_token_id": 0,
    "eos_token_id": 5,
}
_SIGLIP_TEXT = {**_CLIP_TEXT, "projection_size": 24}

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

_BART = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 24,
    "d_model": 24,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_layers": 2,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 36,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
}
_MARIAN = {**_BART, "activation_function": "swish", "scale_embedding": True}
_LLAMA = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 12,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 40,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # of the four waves of a head of 8, the second is between the limits
}


@dataclass(frozen=True)
class Tiny:
    """A Hugging Face class with its configuration.

    given     configuration that our model needs and the folder does not contain
    separate  True if lm_head is a separate matrix, although transformers 5 ties every T5
    first     the smallest token that tests draw: Hugging Face's model may read a smaller one as padding
    padding   the token after a row's end, by which Hugging Face's model finds the end; None: any token
    windowed  True if a padding position may see no token at all; its outputs are not compared
    renamed   True if the model differs from another one only in its head's size and in the names of its weights
    """

    architecture: str
    config: Mapping[str, Any]
    given: Mapping[str, Any] = field(default_factory=dict)
    separate: bool = False
    first: int = 0
    padding: int | None = None
    windowed: bool = False
    renamed: bool = False

    def build(self) -> PreTrainedModel:
        """Return the model in float32, in evaluation mode. Its weights are the same each time."""
        cls = getattr(transformers, self.architecture)
        model: PreTrainedModel = cls(cls.config_class(**self.config)).eval()
        if self.separate:
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                mean = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
                weight.normal_(mean, 0.2, generator=generator)
            for name, buffer in model.named_buffers():
                if name == "final_logits_bias":
                    buffer.normal_(0.0, 0.2, generator=generator)
            for module in model.modules():
                if hasattr(module, "create_weight"):  # Marian's sinusoids, which its files leave out
                    module.weight.copy_(module.create_weight())
        return model


TINY = {
    "gpt2": Tiny("GPT2LMHeadModel", _GPT2),
    "gpt2-gelu": Tiny("GPT2LMHeadModel", {**_GPT2, "n_inner": 20, "activation_function": "gelu"}),
    "gpt2-hidden": Tiny("GPT2Model", _GPT2),
    "gpt2-classifier": Tiny("GPT2ForSequenceClassification", {**_PADDED_GPT2, "num_labels": 5}, padding=VOCAB),
    "gpt2-token-classifier": Tiny("GPT2ForTokenClassification", {**_GPT2, "num_labels": 3}, renamed=True),
    "gpt2-answers": Tiny("GPT2ForQuestionAnswering", _GPT2, renamed=True),
    "bert": Tiny("BertModel", _BERT),
    "bert-pooler": Tiny("BertModel", {**_BERT, "hidden_act": "gelu_new"}, {"head": "pooler"}),
    "bert-masked-lm": Tiny("BertForMaskedLM", _BERT),
    "bert-classifier": Tiny("BertForSequenceClassification", {**_BERT, "num_labels": 5}),
    "bert-token-classifier": Tiny("BertForTokenClassification", {**_BERT, "num_labels": 3, "hidden_act": "relu"}),
    "bert-answers": Tiny("BertForQuestionAnswering", _BERT),
    "bert-choices": Tiny("BertForMultipleChoice", _BERT, renamed=True),
    "bert-next-sentence": Tiny("BertForNextSentencePrediction", {**_BERT, "num_labels": 3}, renamed=True),
    "bert-pretraining": Tiny("BertForPreTraining", _BERT),
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
    "distilbert": Tiny("DistilBertModel", _DISTILBERT),
    "distilbert-masked-lm": Tiny("DistilBertForMaskedLM", {**_DISTILBERT, "sinusoidal_pos_embds": True}),
    "distilbert-classifier": Tiny("DistilBertForSequenceClassification", {**_DISTILBERT, "num_labels": 5}),
    "distilbert-answers": Tiny("DistilBertForQuestionAnswering", {**_DISTILBERT, "activation": "relu"}),
    "distilbert-choices": Tiny("DistilBertForMultipleChoice", _DISTILBERT, renamed=True),
    "roberta": Tiny("RobertaModel", _ROBERTA),
    "roberta-masked-lm": Tiny("RobertaForMaskedLM", _ROBERTA),
    "roberta-classifier": Tiny("RobertaForSequenceClassification", {**_ROBERTA, "num_labels": 5}),
    "roberta-token-classifier": Tiny("RobertaForTokenClassification", {**_ROBERTA, "num_labels": 3}),
    "xlm-roberta": Tiny("XLMRobertaForMaskedLM", _ROBERTA),
    "camembert": Tiny("CamembertForMaskedLM", _ROBERTA),
    "camembert-choices": Tiny("CamembertForMultipleChoice", _ROBERTA, renamed=True),
    "albert": Tiny("AlbertModel", _ALBERT),
    "albert-pooler": Tiny("AlbertModel", _ALBERT, {"head": "pooler"}),
    "albert-masked-lm": Tiny("AlbertForMaskedLM", {**_ALBERT, "hidden_act": "gelu"}),
    "albert-classifier": Tiny("AlbertForSequenceClassification", {**_ALBERT, "num_labels": 5}),
    "albert-token-classifier": Tiny("AlbertForTokenClassification", _ALBERT),
    "albert-pretraining": Tiny("AlbertForPreTraining", _ALBERT),
    "albert-choices": Tiny("AlbertForMultipleChoice", _ALBERT, renamed=True),
    "electra": Tiny("ElectraModel", _ELECTRA),
    "electra-discriminator": Tiny("ElectraForPreTraining", {**_BERT, "embedding_size": 24, "hidden_act": "relu"}),
    "electra-generator": Tiny("ElectraForMaskedLM", {**_ELECTRA, "hidden_act": "relu"}),
    "electra-classifier": Tiny("ElectraForSequenceClassification", {**_ELECTRA, "num_labels": 5, "hidden_act": "relu"}),
    "electra-token-classifier": Tiny("ElectraForTokenClassification", {**_ELECTRA, "num_labels": 3}, renamed=True),
    "electra-answers": Tiny("ElectraForQuestionAnswering", _ELECTRA, renamed=True),
    "electra-choices": Tiny("ElectraForMultipleChoice", _ELECTRA, renamed=True),
    "mpnet": Tiny("MPNetModel", _MPNET, first=2),
    "mpnet-pooler": Tiny("MPNetModel", {**_MPNET, "hidden_act": "relu"}, {"head": "pooler"}, first=2),
    "mpnet-masked-lm": Tiny("MPNetForMaskedLM", {**_MPNET, "hidden_act": "relu"}, first=2),
    "mpnet-classifier": Tiny("MPNetForSequenceClassification", {**_MPNET, "num_labels": 5}, first=2),
    "mpnet-token-classifier": Tiny("MPNetForTokenClassification", {**_MPNET, "num_labels": 3}, first=2, renamed=True),
    "mpnet-answers": Tiny("MPNetForQuestionAnswering", _MPNET, first=2, renamed=True),
    "mpnet-choices": Tiny("MPNetForMultipleChoice", _MPNET, first=2, renamed=True),
    "modernbert": Tiny(
        "ModernBertModel",
        {
            **_MODERNBERT,
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "hidden_activation": "gelu_new",
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        },
        windowed=True,
    ),
    "modernbert-masked-lm": Tiny("ModernBertForMaskedLM", _MODERNBERT, windowed=True),
    "modernbert-bare-masked-lm": Tiny(
        "ModernBertForMaskedLM",
        {**_MODERNBERT, "decoder_bias": False, "classifier_bias": True, "classifier_activation": "relu"},
        windowed=True,
    ),
    "modernbert-classifier": Tiny(
        "ModernBertForSequenceClassification", {**_MODERNBERT, "num_labels": 5, "local_attention": 7}, windowed=True
    ),
    "modernbert-mean": Tiny(
        "ModernBertForSequenceClassification", {**_MODERNBERT, "classifier_pooling": "mean"}, windowed=True
    ),
    "modernbert-token-classifier": Tiny(
        "ModernBertForTokenClassification", {**_MODERNBERT, "num_labels": 3}, windowed=True, renamed=True
    ),
    "modernbert-answers": Tiny("ModernBertForQuestionAnswering", _MODERNBERT, windowed=True, renamed=True),
    "modernbert-choices": Tiny("ModernBertForMultipleChoice", _MODERNBERT, windowed=True, renamed=True),
    "vit": Tiny("ViTModel", _VIT),
    "vit-pooler": Tiny("ViTModel", {**_VIT, "image_size": 14}, {"head": "pooler"}),  # 14: two pixels over
    "vit-classifier": Tiny("ViTForImageClassification", {**_VIT, "num_labels": 5, "hidden_act": "quick_gelu"}),
    "deit": Tiny("DeiTModel", _VIT),
    "deit-classifier": Tiny("DeiTForImageClassification", {**_VIT, "num_labels": 5}),
    "deit-distilled": Tiny("DeiTForImageClassificationWithTeacher", {**_VIT, "num_labels": 5}),
    "dinov2": Tiny("Dinov2Model", {**_DINOV2, "hidden_act": "relu"}),
    "dinov2-gated": Tiny("Dinov2Model", {**_DINOV2, "use_swiglu_ffn": True, "qkv_bias": False, "image_size": [14, 14]}),
    "dinov2-classifier": Tiny("Dinov2ForImageClassification", {**_DINOV2, "num_labels": 5}),
    "dinov2-larger": Tiny("Dinov2Model", _DINOV2, {"height": 20, "width": 16}),
    "dinov2-smaller": Tiny("Dinov2Model", {**_DINOV2, "image_size": 28}, {"height": 12, "width": 23}),
    "siglip": Tiny("SiglipModel", {"text_config": _SIGLIP_TEXT, "vision_config": _CLIP_VISION}),
    "siglip-text": Tiny("SiglipTextModel", {**_CLIP_TEXT, "hidden_act": "gelu"}),
    "siglip-vision": Tiny("SiglipVisionModel", {**_CLIP_VISION, "image_size": 14}),
    "siglip-patches": Tiny("SiglipVisionModel", {**_CLIP_VISION, "vision_use_head": False}),
    "siglip-classifier": Tiny(
        "SiglipForImageClassification",
        {"vision_config": {**_CLIP_VISION, "vision_use_head": False}, "num_labels": 5},
    ),
    "clip": Tiny("CLIPModel", {"text_config": _CLIP_TEXT, "vision_config": _CLIP_VISION, "projection_dim": 16}),
    "clip-text": Tiny("CLIPTextModel", {**_CLIP_TEXT, "eos_token_id": 2}),
    "clip-text-projected": Tiny("CLIPTextModelWithProjection", {**_CLIP_TEXT, "projection_dim": 16}),
    "clip-vision": Tiny("CLIPVisionModel", {**_CLIP_VISION, "hidden_act": "gelu"}),
    "clip-vision-projected": Tiny("CLIPVisionModelWithProjection", {**_CLIP_VISION, "projection_dim": 16}),
    "biogpt": Tiny("BioGptForCausalLM", _BIOGPT),  # the example of docs/models.md, not a family of ours
    "bart": Tiny("BartForConditionalGeneration", _BART),
    "bart-hidden": Tiny("BartModel", {**_BART, "activation_function": "relu", "scale_embedding": True}),
    "marian": Tiny("MarianMTModel", _MARIAN),
    "marian-two-vocabularies": Tiny(
        "MarianMTModel", {**_MARIAN, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": VOCAB + 4}
    ),
    "mt5": Tiny("MT5ForConditionalGeneration", _T5),
    "llama": Tiny("LlamaForCausalLM", _LLAMA),
    "llama-linear": Tiny(
        "LlamaForCausalLM",
        {
            **_LLAMA,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "hidden_act": "gelu",
        },
    ),
    "llama-dynamic": Tiny(
        "LlamaForCausalLM",
        {
            **_LLAMA,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        },
    ),
    "llama-3": Tiny("LlamaForCausalLM", {**_LLAMA, "head_dim": 8, "rope_parameters": _LLAMA3}),
    "mistral": Tiny("MistralForCausalLM", {**_LLAMA, "sliding_window": 5, "head_dim": 8}),
    "qwen2": Tiny("Qwen2ForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "gemma": Tiny("GemmaForCausalLM", {**_LLAMA, "num_key_value_heads": 1, "head_dim": 8}),
}


def save(name: str, folder: Path) -> PreTrainedModel:
    """Save a tiny model as a folder with config.json and model.safetensors; return the model."""
    model = TINY[name].build()
    model.save_pretrained(folder)
    return model


def answer(model: PreTrainedModel, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Return the model's outputs under our names, for inputs under our names."""
    given = {_INPUTS[n]: torch.from_numpy(x) for n, x in inputs.items() if n != "lengths"}
    if "lengths" in inputs:
        places = np.arange(inputs["tokens"].shape[1])
        given["attention_mask"] = torch.from_numpy((places < inputs["lengths"][:, None]).astype(np.int64))
    choices = type(model).__name__.endswith("ForMultipleChoice")
    if choices:  # our rows are the choices of a single question
        given = {name: x[None] for name, x in given.items()}
    with torch.no_grad():
        out = model(**given)
    found = {ours: out[theirs].numpy() for ours, theirs in _OUTPUTS if theirs in out and out[theirs] is not None}
    if choices:
        found["logits"] = found["logits"].T
    if "start_logits" in out:
        found["logits"] = np.stack([out["start_logits"].numpy(), out["end_logits"].numpy()], axis=-1)
    return found


_INPUTS = {
    "tokens": "input_ids",
    "decoder_tokens": "decoder_input_ids",
    "token_types": "token_type_ids",
    "pixels": "pixel_values",
    "mel": "input_features",
}
_OUTPUTS = [
    ("logits", "logits"),
    ("logits", "prediction_logits"),
    ("next_sentence", "seq_relationship_logits"),
    ("next_sentence", "sop_logits"),
    ("hidden", "last_hidden_state"),
    ("pooled", "pooler_output"),
    *((name, name) for name in ("logits_per_text", "logits_per_image", "text_embeds", "image_embeds")),
]
