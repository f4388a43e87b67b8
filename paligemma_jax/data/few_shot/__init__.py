"""Images of named classes, and the few of each that a model is tuned on."""
