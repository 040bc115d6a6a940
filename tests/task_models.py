"""Small random folders of Hugging Face's classes with tokenizers, and texts for tests of tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "house",
    "tree",
    "river",
    "stone",
    "bird",
    "sky",
    "blue",
    "green",
    "runs",
    "sits",
    "sings",
    "under",
    "over",
    "near",
    "old",
    "new",
]
WORDS += [
    "café",
    "naïve",
    "Zürich",
    "London",
    "Paris",
    "Ada",
    "Grace",
    "lived",
    "wrote",
    "code",
    "moved",
    "walked",
    "quickly",
    "unhappy",
]
WORDS += ["playing", "played", "player"]
PIECES = ["##s", "##ing", "##ed", "##er", "##ly", "un", "happy", "play", "walk", "quick", ".", ",", "?", "!", "'"]


def texts(count: int, seed: int = 0, longest: int = 14) -> list[str]:
    """Draw sentences of known words, words that are split into pieces, unknown words, accents and punctuation."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        words = list(draw.choice([*WORDS, "walking", "happyer", "qqq", "Œuvre", "don't"], draw.integers(1, longest)))
        made.append(" ".join(words) + str(draw.choice(["", ".", "?", " !"])))
    return made


def wordpiece() -> Any:
    """Return a BERT tokenizer with a small vocabulary."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    normalizer = transformers.BertTokenizer().backend_tokenizer.normalizer
    lower = [normalizer.normalize_str(word) for word in WORDS]
    names = list(dict.fromkeys([*special, *lower, *PIECES, *letters, *("##" + letter for letter in letters)]))
    return transformers.BertTokenizer(vocab={name: i for i, name in enumerate(names)}, model_max_length=40)


def byte_level() -> Any:
    """Return a RoBERTa tokenizer, trained on the texts."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(texts(300, 7), vocab_size=400, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    data = json.loads(made.to_str())["model"]
    merges = [tuple(merge) for merge in data["merges"]]
    return transformers.RobertaTokenizer(vocab=data["vocab"], merges=merges, model_max_length=40)


def mpnet() -> Any:
    """Return an MPNet tokenizer with the same vocabulary: other special tokens; the padding token is number 1."""
    special = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"]
    names = [name for name in sorted(wordpiece().get_vocab(), key=wordpiece().get_vocab().get) if name[0] != "["]
    vocabulary = {name: i for i, name in enumerate([*special, *names])}
    return transformers.MPNetTokenizer(vocab=vocabulary, model_max_length=40)


def without_types() -> Any:
    """Return BERT's tokenizer for a model without token types."""
    roles = {role: f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    named = {f"{role}_token": name for role, name in roles.items()}
    backend = wordpiece().backend_tokenizer
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=40, **named)


def without_specials() -> Any:
    """Return GPT-2's tokenizer, which adds no special tokens to texts; its padding token is an additional one."""
    model = json.loads(byte_level().backend_tokenizer.to_str())["model"]
    vocabulary = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    merges = [tuple(merge) for merge in model["merges"]]
    return transformers.GPT2Tokenizer(
        vocab=vocabulary, merges=merges, pad_token="<|endoftext|>", model_max_length=40
    )  # fmt: skip


def save(place: Path, architecture: str, tokenizer: Any, scale: float = 3.0, **config: Any) -> Any:
    """Save a random model of a class with this tokenizer as a folder, and return the model."""
    cls = getattr(transformers, architecture)
    vocabulary = len(tokenizer)
    pad = tokenizer.pad_token_id
    sizes = {"vocab_size": vocabulary, "max_position_embeddings": 48 + pad, "pad_token_id": pad}
    if "DistilBert" in architecture:
        sizes |= {"dim": 24, "n_heads": 4, "n_layers": 2, "hidden_dim": 40}
    else:
        sizes |= {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 40}
    if "GPT2" in architecture:
        sizes |= {"max_position_embeddings": 48, "eos_token_id": pad, "bos_token_id": pad}
    if "Albert" in architecture or "Electra" in architecture:
        sizes["embedding_size"] = 12
    torch.manual_seed(1)
    model = cls(cls.config_class(**{**sizes, **config})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name.lower():
                weight.mul_(scale)  # far from uniform, so that errors show
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return model
