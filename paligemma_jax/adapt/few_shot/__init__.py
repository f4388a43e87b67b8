"""Learned prompts and adapters of a dual encoder (CoPrompt and its relatives)."""
