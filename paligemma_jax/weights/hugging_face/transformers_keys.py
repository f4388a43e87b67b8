"""Keys of transformers' config.json of PaliGemma 1 and 2, SigLIP and CLIP, and how each part's reader treats them.

Sources: the config classes of transformers 4.41 to 5.24 and of the released models.
"""

from paligemma_jax.files.side_files import KnownKeys

# Keys of any config: provenance, initialisation, what a call returns, and how texts are generated. They do not change
# what is computed here; generation takes its options as arguments.
GENERIC = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_auto_class",
        "_commit_hash",
        "_experts_implementation",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "label2id",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "task_specific_params",
        "tie_last_hidden_states",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        "use_return_dict",
        # generation
        "bad_words_ids",
        "begin_suppress_tokens",
        "cache_implementation",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "prefix",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "temperature",
        "tf_legacy_loss",
        "top_k",
        "top_p",
        "typical_p",
    }
)
TOKEN_IDS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})
SIZES = frozenset({"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"})
# transformers drops attention in training mode only, so a model with it answers like one without. Runs here take all
# training settings from their own config, with dropout in adapters and none in attention.
DROPOUT = frozenset({"attention_dropout"})

# The ids in Gemma's tokenizer and data/prompts.py.
PALIGEMMA_TOKENS = {"bos_token_id": (2,), "eos_token_id": (1, [1]), "pad_token_id": (0,)}
TIED = {"tie_word_embeddings": (True, False)}  # whether they are tied is checked together with the arrays

PALIGEMMA = KnownKeys(
    read=frozenset(
        {
            "image_token_id",
            "image_token_index",
            "model_type",
            "projection_dim",
            "text_config",
            "vision_config",
        }
    ),
    only=PALIGEMMA_TOKENS | TIED,
    # sizes that the parts' own configs give, and the loss's mark for no label
    idle=GENERIC
    | {"_vocab_size", "hidden_size", "ignore_index", "num_hidden_layers", "num_image_tokens", "vocab_size"},
)
GEMMA = KnownKeys(
    read=SIZES
    | {
        "head_dim",
        "hidden_act",
        "hidden_activation",
        "layer_types",
        "model_type",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "vocab_size",
    },
    only={"attention_bias": (False,), "partial_rotary_factor": (1.0, 1)} | TIED,
    # the third is of decoders without the prefix-LM mask, which sets the attention here
    idle=GENERIC | TOKEN_IDS | {"max_position_embeddings", "num_image_tokens", "use_bidirectional_attention"},
    dropout=DROPOUT,
)
GEMMA_2 = KnownKeys(
    read=GEMMA.read | {"attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "sliding_window"},
    only=GEMMA.only,
    idle=GEMMA.idle,
    dropout=DROPOUT,
)
VISION = KnownKeys(
    read=SIZES | {"hidden_act", "image_size", "layer_norm_eps", "patch_size"},
    only={"num_channels": (3,)},
    # dropout is in CLIP's first configs, and no release reads it; the last three are from PaliGemma's converter
    idle=GENERIC | TOKEN_IDS | {"dropout", "projection_dim", "num_image_tokens", "projector_hidden_act", "vocab_size"},
    dropout=DROPOUT,
)
TEXT = KnownKeys(
    read=SIZES | {"hidden_act", "layer_norm_eps", "max_position_embeddings", "vocab_size"},
    idle=GENERIC | {"bos_token_id", "dropout", "pad_token_id"},
    dropout=DROPOUT,
)


def _with(keys: KnownKeys, read=(), only=(), idle=()) -> KnownKeys:
    return KnownKeys(keys.read | set(read), dict(keys.only) | dict(only), keys.idle | set(idle), keys.dropout)


_TIED = {"tie_word_embeddings"}  # there is no output embedding
# Keys of a dual encoder's config and of its towers' configs, by model_type.
DUAL = {
    "siglip": {
        "": KnownKeys(frozenset({"model_type", "vision_config", "text_config"}), {}, GENERIC | _TIED | TOKEN_IDS),
        "vision_config": _with(
            VISION,
            only={"model_type": ("siglip_vision_model",), "vision_use_head": (True,)},
            idle=_TIED,
        ),
        "text_config": _with(
            TEXT,
            read={"projection_size"},
            only={"model_type": ("siglip_text_model",)},
            idle=_TIED | {"eos_token_id"},  # the last position is pooled, whatever token it holds
        ),
    },
    "clip": {
        "": KnownKeys(
            frozenset(
                {
                    "model_type",
                    "projection_dim",
                    "text_config",
                    "text_config_dict",
                    "vision_config",
                    "vision_config_dict",
                }
            ),
            {},
            GENERIC | _TIED | TOKEN_IDS | {"logit_scale_init_value"},
        ),
        "vision_config": _with(VISION, only={"model_type": ("clip_vision_model",)}, idle=_TIED),
        "text_config": _with(
            TEXT, read={"eos_token_id"}, only={"model_type": ("clip_text_model",)}, idle=_TIED | {"projection_dim"}
        ),
    },
}
# Keys of a PaliGemma's tower, which has no pooling head whatever its config says.
PALIGEMMA_VISION = _with(VISION, only={"model_type": ("siglip_vision_model",)}, idle=_TIED | {"vision_use_head"})
