"""Flow matching in JAX: this half of the toolkit is under construction."""
