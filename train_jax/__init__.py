"""The runtime: one training loop for any task; knows nothing of images, text or flows."""
