"""What flows are trained on: points in the plane, digits, pictures; and pairs of noise and data."""
