"""Where a model's files lie, and the JSON files beside its weights."""
