"""Adapters, prompts and quantization, applied to a loaded model without changes to its code."""
