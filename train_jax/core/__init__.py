"""What every package may import: errors, patterns, parameter trees, files, metrics. It knows nothing of runs."""
