"""The SigLIP and CLIP losses, chunked within a device and around a ring of devices."""
