"""The machine a run is on: memory, clock, disk, signals."""
