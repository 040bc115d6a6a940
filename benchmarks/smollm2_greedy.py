"""SmolLM2 from its GGUF file compared with Hugging Face: greedy continuations of ten prompts.

    treadle fetch smollm2
    python benchmarks/smollm2_greedy.py [--backend torch] [--prompts 10] [--tokens 32]

The same dequantized weights are loaded into Hugging Face's LlamaForCausalLM, with the rows of q and k in its own order.
A continuation may diverge from Hugging Face's only at a token where its two best logits differ by less than NEAR; past
that token the two read different prefixes and are not compared. Exit status 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from treadle.compiled import Compiled
from treadle.entry_functions import compile
from treadle.fetching import fetched_model
from treadle.frontends.gguf_file import GGUFFile
from treadle.frontends.vocabularies.gguf_tokenizer import build_gguf_tokenizer
from treadle.ir.transforms.encoded_weights import decode_weights
from treadle.runtime.generation import generate

Array = np.ndarray[Any, Any]

NEAR = 1e-3
"""Logits are near 20, where float32's spacing is 2e-6; some hundred roundings follow each other in 30 layers."""

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "The three primary colours are",
    "<|im_start|>user\nWhat is a compiler?<|im_end|>\n<|im_start|>assistant\n",
    "In 1969, the first humans",
    "To make bread you need flour, water,",
    "The opposite of hot is",
    "Shakespeare wrote many plays, among them",
)


@dataclass(frozen=True)
class Continuation:
    """A model's continuation.

    tokens  the ids after the prompt
    gaps    at each, the difference of the best logit and the second
    """

    tokens: list[int]
    gaps: list[float]


def hugging_face(weights: Mapping[str, Array]) -> transformers.LlamaForCausalLM:
    """Return Hugging Face's model of these weights, in float32."""
    config = model_config(weights)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    theirs.load_state_dict(state(weights, config), assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)  # its frequencies are not weights
    theirs.tie_weights()
    return theirs.eval()


def model_config(weights: Mapping[str, Array]) -> transformers.LlamaConfig:
    """Return SmolLM2-135M's configuration, with sizes from the weights."""
    vocab, dim = weights["embed.weight"].shape
    return transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=weights["layer.0.mlp.up.weight"].shape[0],
        num_hidden_layers=sum(name.endswith(".attn.q.weight") for name in weights),
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )


def state(weights: Mapping[str, Array], config: transformers.LlamaConfig) -> dict[str, torch.Tensor]:
    """Return the weights under Hugging Face's names.

    Rows of q and k are halves of a head, where GGUF interleaves them in pairs.
    """
    parts = {
        "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
        "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
        "attn.out": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
    }  # fmt: skip
    found = {"model.embed_tokens.weight": weights["embed.weight"], "model.norm.weight": weights["norm.weight"]}
    found["lm_head.weight"] = weights["embed.weight"]
    for i in range(config.num_hidden_layers):
        for ours, theirs in parts.items():
            weight = weights[f"layer.{i}.{ours}.weight"]
            if ours in ("attn.q", "attn.k"):
                pairs = weight.reshape(-1, config.head_dim // 2, 2, weight.shape[-1])
                weight = pairs.swapaxes(1, 2).reshape(weight.shape)
            found[f"model.layers.{i}.{theirs}.weight"] = weight
    return {name: torch.from_numpy(np.array(weight)) for name, weight in found.items()}


def continue_theirs(model: transformers.LlamaForCausalLM, prompt: Sequence[int], count: int) -> Continuation:
    """Return the greedy continuation by Hugging Face's own generation."""
    ids = torch.tensor([list(prompt)])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count, max_new_tokens=count,
        eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    best = [logits[0].topk(2).values for logits in made.logits]
    return Continuation(made.sequences[0, len(prompt) :].tolist(), [float(b[0] - b[1]) for b in best])


def continue_ours(model: Compiled, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Return greedy continuations, with all prompts in one session."""
    found: list[list[int]] = [[] for _ in prompts]
    session = model.session(rows=len(prompts), capacity=max(map(len, prompts)) + count)
    for token in generate(session, prompts, most=count):
        found[token.row].append(token.id)
    return found


def divergence(ours: Sequence[int], theirs: Continuation) -> tuple[int, float] | None:
    """Return the first position where they differ, and the gap of Hugging Face's two best logits there, or None."""
    pairs = zip(ours, theirs.tokens, strict=True)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    return None if at is None else (at, theirs.gaps[at])


def open_smollm2(path: Path, backend: str) -> tuple[Compiled, Any]:
    """Return the compiled model, and the tokenizer in its file."""
    return compile(path, backend=backend), build_gguf_tokenizer(GGUFFile.open(path))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    path = fetched_model("smollm2")
    if path is None:
        print("smollm2 has not been fetched yet: treadle fetch smollm2")
        return 0
    started = time.perf_counter()
    model, tokenizer = open_smollm2(path, options.backend)
    reference = hugging_face(decode_weights(model.graph, model.weights))
    print(f"loaded in {time.perf_counter() - started:.1f} s, backend {options.backend}")
    prompts = [tokenizer.encode(text).ids for text in PROMPTS[: options.prompts]]
    started = time.perf_counter()
    ours = continue_ours(model, prompts, options.tokens)
    print(f"{len(prompts)} prompts, {options.tokens} tokens each, {time.perf_counter() - started:.1f} s")
    wrong = 0
    for text, prompt, found in zip(PROMPTS, prompts, ours, strict=False):
        theirs = continue_theirs(reference, prompt, options.tokens)
        split = divergence(found, theirs)
        verdict = "equal" if split is None else f"differs at token {split[0]}, gap {split[1]:.2g}"
        wrong += split is not None and split[1] >= NEAR
        print(f"  {verdict:34} least gap {min(theirs.gaps):.2g}  {text!r} ... {tokenizer.decode(found)!r}")
    print(f"{wrong} continuations differ without a near tie")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
