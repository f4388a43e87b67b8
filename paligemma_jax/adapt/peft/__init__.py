"""Other methods of parameter-efficient fine-tuning, by name."""
