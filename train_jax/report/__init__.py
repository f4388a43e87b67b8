"""Reports of a run: printed text, logged metrics and figures."""
