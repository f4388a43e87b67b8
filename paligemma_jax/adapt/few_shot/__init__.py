"""Learned prompts and adapters of a dual encoder: CoOp, MaPLe, CoPrompt."""
