"""The SigLIP and CLIP losses, computed in chunks on a device and around a ring of devices."""
