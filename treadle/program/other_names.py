"""Names of options in other tools and libraries, and the names of these options here."""

from __future__ import annotations

from collections.abc import Collection

from treadle.files.nearest_names import NearestNames

_OTHERS = {
    # training: PyTorch, Transformers, nanoGPT
    "learning_rate": "lr max_lr peak_lr",
    "steps": "max_steps num_steps train_steps training_steps max_iters epochs epoch num_epochs n_epochs "
    "num_train_epochs",
    "batch rows sizes": "batch_size bs per_device_train_batch_size train_batch_size micro_batch_size",
    "length": "block_size",
    "length sizes context window": "max_length seq_len seq_length sequence_length max_seq_len max_seq_length",
    "gradient_accumulation_steps": "accumulation_steps grad_accum gradient_accumulation grad_accumulation_steps",
    "max_grad_norm": "max_norm clip_grad_norm grad_clip clip gradient_clip_val gradient_clip gradient_clipping",
    "warmup": "warmup_steps num_warmup_steps warmup_iters",
    "schedule": "scheduler lr_scheduler lr_scheduler_type lr_schedule lr_decay",
    "optimizer": "optim",
    "weight_decay": "wd",
    "gradient_checkpointing": "activation_checkpointing grad_checkpointing recompute",
    "holdout": "val_split validation_split eval_split val_fraction",
    "save_every": "save_steps checkpoint_every save_interval",
    "every": "log_every logging_steps log_interval",
    "resume": "resume_from resume_from_checkpoint",
    "teacher": "teacher_model",
    "vocab": "vocab_size",
    "loss": "loss_fn criterion",
    "train trained": "lora lora_rank lora_r peft adapter freeze frozen trainable unfreeze",
    # generation and serving: Transformers, llama.cpp, vLLM, Ollama
    "tokens": "max_tokens max_new_tokens n_predict num_predict predict n_tokens max_output_tokens max_length",
    "temperature": "temp do_sample",
    "top_k top": "topk",
    "top": "top_k num_labels",
    "top_p": "topp nucleus",
    "repetition_penalty": "repeat_penalty rep_pen",
    "beams": "num_beams beam_size beam_width",
    "best": "num_return_sequences n_best",
    "stop": "stop_strings stop_sequence stop_sequences stop_words reverse_prompt",
    "draft": "draft_model model_draft assistant_model speculative_model",
    "logprobs": "top_logprobs n_probs output_scores",
    "system": "system_prompt sys",
    "chat": "conversation cnv",
    "context": "ctx_size n_ctx num_ctx max_model_len context_length",
    "rows": "batch max_num_seqs parallel n_parallel max_batch_size slots",
    "capacity": "max_length max_len max_tokens max_seq_len max_seq_length context ctx_size n_ctx context_length",
    "step_tokens": "max_num_batched_tokens ubatch_size chunked_prefill_size",
    "key_file": "api_key api_key_file",
    "host": "hostname bind address",
    "cache": "kv_cache_dtype cache_type_k cache_type_v ctk ctv cache_dtype",
    "prefix_cache": "enable_prefix_caching",
    "mesh": "tensor_parallel_size tp tp_size tensor_split",
    # models, precision and devices
    "models": "model",
    "model models": "model_name model_path model_id model_name_or_path pretrained_model_name_or_path",
    "weights": "state_dict checkpoint ckpt",
    "dtype": "torch_dtype precision fp16 bf16 half float16 bfloat16",
    "quantize": "quantization quant quantization_method load_in_4bit load_in_8bit quantization_config",
    "target": "device device_map gpu",
    "backend": "providers",
    "threads": "num_threads n_threads nthreads num_cpus",
    "seed": "random_seed manual_seed rng_seed",
    "set": "config override overrides",
    "tokenizer": "tokenizer_name tokenizer_path",
    # files, texts and measurements
    "svg": "output",
    "output svg": "out outfile out_file out_dir output_dir output_file save_dir save",
    "files file": "data dataset data_path data_dir train_file train_data text_file input_file",
    "prompts texts sentences": "prompt text input",
    "recordings": "audio audio_file",
    "images image": "img image_file image_path",
    "to": "format tgt target_lang tgt_lang target_language",
    "from": "src src_lang source_lang source_language",
    "grouping": "aggregation_strategy",
    "text": "labels candidate_labels",
    "language": "lang",
    "column": "text_column text_field",
    "window": "stride",
    "input": "inputs feed input_data",
    "sizes": "shape shapes input_size input_shape input_shapes dynamic_axes",
    "rounds": "iterations iters repeat repeats repetitions runs num_runs",
    "passes": "pipeline",
    "without": "disable skip exclude",
    "opset": "opset_version",
    "json": "output_format format",
}


def _by_name() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for ours, others in _OTHERS.items():
        for other in others.split():
            found[other] = (*found.get(other, ()), *ours.split())
    return found


OTHER_NAMES = _by_name()
"""For each name of an option in other tools, its names here. The first one that a command or function has is meant."""


def hints_for(*options: str) -> dict[str, str]:
    """Return hints for options of a Python function by their names in other tools: `rows=...`."""
    meant = {name: next((each for each in ours if each in options), None) for name, ours in OTHER_NAMES.items()}
    return {name: f"{ours}=..." for name, ours in meant.items() if ours is not None}


OTHER_COMMANDS = {
    other: ours
    for ours, others in {
        "train": "finetune fine-tune tune fit pretrain",
        "fetch": "pull download get install",
        "compile": "quantize",
        "embed": "encode embeddings",
        "verify": "test",
        "report": "plot draw visualize viz",
        "export": "convert",
        "models": "list ls",
        "bench": "benchmark",
        "perplexity": "eval evaluate ppl",
        "generate": "complete completion completions infer inference predict sample",
        "run": "exec execute",
        "inspect": "show print dump info summary",
        "answer": "ask qa",
        "doctor": "check env info-env",
    }.items()
    for other in others.split()
}
"""Commands by their names in other tools."""


def meant_option(name: str, ours: Collection[str], similarity: float = 0.75) -> str | None:
    """Return the option among `ours` that has this name elsewhere, or else the most similar name, or None.

    similarity  the least similarity of a similar name
    """
    other = next((each for each in OTHER_NAMES.get(name, ()) if each in ours), None)
    return other or next(iter(NearestNames(ours).of(name, 1, similarity)), None)
