"""Config keys: defaults, the command line, validation, durations, and what a resumed run may change."""
