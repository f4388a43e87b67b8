"""Locations of a model's files, and the JSON files beside its weights."""
