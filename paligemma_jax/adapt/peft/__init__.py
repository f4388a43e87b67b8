"""Methods of parameter-efficient fine-tuning other than LoRA."""
