"""From a random-access source to a stream of batches that is a pure function of (seed, step)."""
