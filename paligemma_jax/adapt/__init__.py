"""Changes to a loaded model that leave its code alone."""
