"""Small random vision-language models of Hugging Face, saved as folders, and their own prompts and answers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

Array = np.ndarray[Any, Any]

KINDS = ("llava", "smolvlm", "idefics3", "qwen2_vl", "qwen2_5_vl")
QUESTION = "What does this show, and which of its colors are the brightest? \N{LATIN SMALL LETTER E WITH ACUTE}"
_TEXT = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
}
_VISION = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 40}
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}MARK"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
_TILES = ["<fake_token_around_image>", "<global-img>", *(f"<row_{r}_col_{c}>" for r in "123" for c in "123")]


@dataclass(frozen=True)
class VisionModel:
    """A saved model with its image processor and its tokenizer."""

    kind: str
    place: Path
    model: Any
    images: Any
    tokenizer: Any

    @property
    def mark(self) -> str:
        """The image token."""
        return "<|image_pad|>" if self.kind.startswith("qwen") else "<image>"

    def inputs(self, messages: Sequence[Any], files: Sequence[bytes]) -> dict[str, Any]:
        """Return the inputs that Hugging Face's processors make of a conversation with images."""
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        opened = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
        if self.kind in ("smolvlm", "idefics3"):
            made = transformers.Idefics3Processor(self.images, self.tokenizer, image_seq_len=4)(
                images=opened or None, text=text, return_tensors="pt"
            )
            return {name: x for name, x in made.items() if name != "token_type_ids"}
        shown = dict(self.images(opened, return_tensors="pt")) if opened else {}
        grids = shown["image_grid_thw"].prod(1) // 4 if "image_grid_thw" in shown else [16] * len(opened)
        for count in grids:
            text = text.replace(self.mark, "\0" * int(count), 1)
        ids = self.tokenizer(text.replace("\0", self.mark), return_tensors="pt")["input_ids"]
        if "image_grid_thw" in shown:
            shown["mm_token_type_ids"] = (ids == self.tokenizer.convert_tokens_to_ids(self.mark)).int()
        return {"input_ids": ids, **shown}

    def logits(self, inputs: dict[str, Any]) -> Array:
        """Return Hugging Face's logits [S, vocab]."""
        with torch.no_grad():
            found: Array = self.model(**inputs).logits[0].numpy()
        return found

    def answer(self, inputs: dict[str, Any], most: int) -> list[int]:
        """Return the tokens that Hugging Face generates greedily."""
        ids = inputs["input_ids"]
        given = {"attention_mask": torch.ones_like(ids), **inputs}
        with torch.no_grad():
            made = self.model.generate(**given, max_new_tokens=most, do_sample=False, eos_token_id=None, pad_token_id=0)
        return [int(token) for token in made[0, ids.shape[1] :]]


def save_vision_model(kind: str, place: Path, *, wide: bool = False) -> VisionModel:
    """Save a random model as a folder, with its tokenizer, its chat template and the settings of its images.

    wide  True if all widths of LLaVA and SmolVLM are multiples of 32, the length of a block in a GGUF file
    """
    is_qwen = kind.startswith("qwen")
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_end|>"] if is_qwen else ["<image>", *_TILES]
    tokenizer = _tokenizer(marks)
    id_of = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": 300,
        **_TEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **({"intermediate_size": 64} if wide else {}),
    }
    encoder = {**_VISION, **({"hidden_size": 32, "intermediate_size": 64} if wide else {})}
    if kind == "llava":
        name, folder, options = "Llava", "llava", {"size": {"shortest_edge": 32}, "crop_size": 32}
        vision = {**encoder, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8}
        config = {"text_config": {"model_type": "llama", **text}, "image_token_index": id_of("<image>")}
    elif kind in ("smolvlm", "idefics3"):
        name, folder = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[kind], "idefics3"
        options = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}
        vision = {**encoder, "image_size": 32, "patch_size": 4}
        config = {"text_config": {"model_type": "llama", **text}, "image_token_id": id_of("<image>"), "scale_factor": 4}
    else:
        name, folder = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}[kind], "qwen2_vl"
        options = {"size": {"shortest_edge": 256, "longest_edge": 64 * 30}, "patch_size": 4}
        vision = {"depth": 3, "num_heads": 3, "patch_size": 4}
        if kind == "qwen2_vl":
            vision |= {"embed_dim": 24, "hidden_size": 32, "mlp_ratio": 2}
        else:
            vision |= {"hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 40, "window_size": 16}
            vision["fullatt_block_indexes"] = [1]
        rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        config = {"text_config": {**text, "rope_parameters": rotary}, "image_token_id": id_of("<|image_pad|>")}
        config["video_token_id"] = id_of("<|video_pad|>")
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}Config")(vision_config=vision, **config)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(made).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            is_norm = ("norm" in weight_name or "ln_q" in weight_name) and weight_name.endswith("weight")
            weight.normal_(1.0 if is_norm else 0.0, 0.25, generator=generator)
    module = import_module(f"transformers.models.{folder}.image_processing_pil_{folder}")
    processor = {"llava": "Llava", "idefics3": "Idefics3", "qwen2_vl": "Qwen2VL"}[folder]
    images = getattr(module, f"{processor}ImageProcessorPil")(**options)
    tokenizer.chat_template = _TEMPLATE.replace("MARK", marks[0] + "<|vision_end|>" * is_qwen)
    for each in (model, images, tokenizer):
        each.save_pretrained(place)
    return VisionModel(kind, place, model, images, tokenizer)


def image_files(count: int, seed: int = 0) -> list[bytes]:
    """Return PNG files of random images of different sizes."""
    rng = np.random.default_rng(seed)
    files = []
    for _ in range(count):
        height, width = (int(side) for side in rng.integers(16, 120, 2))
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (height, width, 3)).astype(np.uint8)).save(buffer, "png")
        files.append(buffer.getvalue())
    return files


def asked(images: int, question: str = QUESTION) -> list[dict[str, Any]]:
    """Return a conversation of one message that shows images."""
    return [{"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": question}]}]


def _tokenizer(marks: Sequence[str]) -> Any:
    """Return a tokenizer of bytes with these special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", additional_special_tokens=list(marks)
    )
