"""Reads examples from data sets and turns their images and texts into arrays."""
