"""Answers about image files: prompts, zero-shot classes, attributes."""
