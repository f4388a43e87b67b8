"""LoRA and DoRA."""

from paligemma_jax.adapt.lora.adapter import (
    attach_lora,
    detach_lora,
    format_lora_table,
    largest_logit_gap,
    lora_projections,
    lora_table,
    merge_lora,
)

__all__ = [
    "attach_lora",
    "detach_lora",
    "format_lora_table",
    "largest_logit_gap",
    "lora_projections",
    "lora_table",
    "merge_lora",
]
