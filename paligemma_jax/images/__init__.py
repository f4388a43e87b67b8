"""Turns encoded images into model input, as each checkpoint's family does."""
