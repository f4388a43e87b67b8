"""The memory, compute and communication of a run, read from its compiled programs."""
