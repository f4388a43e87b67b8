"""One training step: the train state, its sharding, and the pure function that the loop compiles."""
