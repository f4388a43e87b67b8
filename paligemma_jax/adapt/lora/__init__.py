"""LoRA and DoRA."""
