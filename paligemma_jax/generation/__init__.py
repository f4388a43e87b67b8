"""Text generation and scoring: samplers, beam search, candidates."""
