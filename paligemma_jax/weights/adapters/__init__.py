"""Adapters on disk, apart from their base: peft's folders and our own."""
