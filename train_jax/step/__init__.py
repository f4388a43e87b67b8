"""One training step: the train state, where its arrays lie, and the pure function that the loop compiles."""
