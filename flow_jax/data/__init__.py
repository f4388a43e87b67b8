"""Training data of flows: points in the plane, digits, images; and pairs of noise and data."""
