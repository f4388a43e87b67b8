"""Definitions that every package may import: errors, patterns, parameter trees, files, metrics, data sources."""
