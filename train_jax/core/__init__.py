"""What every floor may import: it knows nothing of runs."""
