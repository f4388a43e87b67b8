"""The machine of a run: memory, clock, disk and signals."""
