"""Adapters on disk, without their base: peft's folders and our own."""
