"""The input pipeline: batches from a random-access source, a pure function of (seed, step)."""
