"""Keys of a config.json that change no output of any family, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping

_REASONS: Mapping[str, str] = {
    "records where the file comes from": """
        _name_or_path name_or_path _commit_hash transformers_version auto_map _auto_class base_model_tp_plan
        base_model_pp_plan transformers.js_config unsloth_fixed unsloth_version is_llama_config license
        language
    """,
    "follows from the class, which the family reads": "architectures model_type is_encoder_decoder",
    "makes a decoder of BERT and similar models, whose families read it": """
        is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder
    """,
    "belongs to an output that reads the embeddings, which the model lacks": "tie_word_embeddings",
    "the weights' dtype is in their file": "dtype torch_dtype use_bfloat16 fp16 bf16",
    "belongs to a task, which reads it itself": """
        task_specific_params finetuning_task problem_type label2id num_labels _num_labels id2label
        tokenizer_class prefix vocab_file model_max_length max_sequence_length
    """,
    "chooses between equivalent computations": """
        _attn_implementation attn_implementation _attn_implementation_internal _attn_implementation_autoset
        _experts_implementation _experts_implementation_internal _flash_attn_2_enabled use_flash_attention
        use_flash_attn cache_implementation chunk_size_feed_forward pretraining_tp deterministic_flash_attn
        reference_compile repad_logits_with_grad reorder_and_upcast_attn torchscript use_cache
        gradient_checkpointing output_past
    """,
    "selects the returned values": """
        output_attentions _output_attentions output_hidden_states return_dict use_return_dict output_scores
        return_dict_in_generate tie_last_hidden_states
    """,
    "only affects training": """
        attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob classifier_dropout
        classifier_dropout_prob classif_dropout dropout dropout_rate activation_dropout attn_pdrop
        embd_pdrop resid_pdrop summary_first_dropout summary_last_dropout qa_dropout seq_classif_dropout
        embedding_dropout mlp_dropout layerdrop encoder_layerdrop decoder_layerdrop drop_path_rate
        tf_legacy_loss label_smoothing initializer_range initializer_factor init_std
        initializer_cutoff_factor logit_scale_init_value layerscale_value apply_spec_augment mask_time_prob
        mask_time_length mask_time_min_masks mask_feature_prob mask_feature_length mask_feature_min_masks
        sparse_prediction sparse_pred_ignore_index
    """,
    "belongs to generation, which reads it itself": """
        bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
        bos_token_ids eos_token_ids decoder_start_token_id forced_bos_token_id forced_eos_token_id
        force_bos_token_to_be_generated max_length min_length max_new_tokens min_new_tokens do_sample
        early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p
        repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
        num_return_sequences remove_invalid_values exponential_decay_length_penalty suppress_tokens
        begin_suppress_tokens forced_decoder_ids max_time penalty_alpha
    """,
    "follows from the shapes of the weights": "pruned_heads",
}

IRRELEVANT: Mapping[str, str] = {key: reason for reason, keys in _REASONS.items() for key in keys.split()}
"""The reason by key. A key that a family reads, such as CLIP's `eos_token_id`, is still relevant to it."""
