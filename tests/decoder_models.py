"""Small Hugging Face decoders, one or more for each decoder-only family. Together their settings cover every option."""

from __future__ import annotations

from typing import Any

from tests.hf_models import VOCAB, Tiny

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 40,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_LLAMA = {**_SIZES, "num_key_value_heads": 2}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 4.0, 9.0],
}
_GEMMA = {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 20, "sliding_window": 4}

_GPTJ = {
    "vocab_size": VOCAB,
    "n_positions": 32,
    "n_embd": 24,
    "n_head": 4,
    "n_layer": 3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_FALCON = {name: size for name, size in _SIZES.items() if name != "intermediate_size"}
_OPT = {**_FALCON, "ffn_dim": 40, "word_embed_proj_dim": 24}

DECODERS = {
    "yarn": Tiny("LlamaForCausalLM", {**_LLAMA, "head_dim": 16, "rope_parameters": _YARN}),
    "yarn-weighed": Tiny(
        "LlamaForCausalLM",
        {
            **_LLAMA,
            "head_dim": 16,
            "rope_parameters": {
                **_YARN,
                "mscale": 0.7,
                "mscale_all_dim": 0.4,
                "beta_fast": 6,
                "beta_slow": 0.5,
                "truncate": False,
            },
        },
    ),
    "yarn-told": Tiny("Qwen2ForCausalLM", {**_LLAMA, "rope_parameters": {**_YARN, "attention_factor": 1.3}}),
    "qwen3": Tiny("Qwen3ForCausalLM", {**_LLAMA, "head_dim": 8}),
    "qwen3-windows": Tiny(
        "Qwen3ForCausalLM",
        {
            **_LLAMA,
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2": Tiny("Gemma2ForCausalLM", {**_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    "gemma2-uncapped": Tiny(
        "Gemma2ForCausalLM",
        {
            **_GEMMA,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "hidden_activation": "silu",
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "attention_bias": True,
        },
    ),
    "gemma3": Tiny("Gemma3ForCausalLM", {**_GEMMA, "sliding_window_pattern": 2}),
    "gemma3-far": Tiny(
        "Gemma3ForCausalLM",
        {
            **_GEMMA,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
            "final_logit_softcapping": 4.0,
        },
    ),
    "phi3": Tiny("Phi3ForCausalLM", {**_LLAMA, "sliding_window": 5}),
    "phi3-part": Tiny(
        "Phi3ForCausalLM",
        {
            **_LLAMA,
            "hidden_size": 32,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.75},
        },
    ),
    "phi3-long": Tiny(
        "Phi3ForCausalLM",
        {**_LLAMA, "original_max_position_embeddings": 16, "rope_parameters": _LONGROPE},
        {"longest": 16},
    ),
    "phi3-long-part": Tiny(
        "Phi3ForCausalLM",
        {
            **_LLAMA,
            "hidden_size": 32,
            "original_max_position_embeddings": 16,
            "rope_parameters": {**_LONGROPE, "partial_rotary_factor": 0.75, "attention_factor": 1.4},
        },
        {"longest": 16},
    ),
    "olmo2": Tiny("Olmo2ForCausalLM", _LLAMA),
    "olmo2-biased": Tiny("Olmo2ForCausalLM", {**_LLAMA, "attention_bias": True, "num_key_value_heads": 4}),
    "stablelm": Tiny("StableLmForCausalLM", {**_LLAMA, "hidden_size": 32}),
    "stablelm-biased": Tiny(
        "StableLmForCausalLM",
        {
            **_LLAMA,
            "hidden_size": 32,
            "use_qkv_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "stablelm-yarn": Tiny(
        "StableLmForCausalLM",
        {**_LLAMA, "hidden_size": 32, "rope_parameters": {**_YARN, "partial_rotary_factor": 0.5}},
    ),
    "granite": Tiny(
        "GraniteForCausalLM",
        {
            **_LLAMA,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
        },
    ),
    "granite-biased": Tiny(
        "GraniteForCausalLM", {**_LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    ),
    "gpt-neox": Tiny("GPTNeoXForCausalLM", {**_SIZES, "hidden_size": 32}),
    "gpt-neox-serial": Tiny(
        "GPTNeoXForCausalLM",
        {
            **_SIZES,
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_fast",
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 1.0},
        },
    ),
    "gpt-neox-yarn": Tiny(
        "GPTNeoXForCausalLM",
        {**_SIZES, "hidden_size": 32, "rope_parameters": {**_YARN, "partial_rotary_factor": 0.5}},
    ),
    "gptj": Tiny("GPTJForCausalLM", {**_GPTJ, "rotary_dim": 4}),
    "gptj-whole": Tiny("GPTJForCausalLM", {**_GPTJ, "rotary_dim": 6, "n_inner": 20, "activation_function": "relu"}),
    "phi": Tiny("PhiForCausalLM", {**_SIZES, "hidden_size": 32}),
    "phi-normed": Tiny(
        "PhiForCausalLM",
        {
            **_LLAMA,
            "hidden_size": 32,
            "qk_layernorm": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25},
        },
    ),
    "falcon": Tiny("FalconForCausalLM", _FALCON),
    "falcon-serial": Tiny("FalconForCausalLM", {**_FALCON, "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon-grouped": Tiny("FalconForCausalLM", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-one-norm": Tiny(
        "FalconForCausalLM",
        {
            **_FALCON,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
            "ffn_hidden_size": 40,
        },
    ),
    "opt": Tiny("OPTForCausalLM", _OPT),
    "opt-projected": Tiny(
        "OPTForCausalLM",
        {**_OPT, "word_embed_proj_dim": 10, "do_layer_norm_before": False, "activation_function": "gelu"},
    ),
    "opt-bare": Tiny("OPTForCausalLM", {**_OPT, "enable_bias": False, "_remove_final_layer_norm": True}),
}
