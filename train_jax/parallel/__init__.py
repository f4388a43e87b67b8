"""Meshes, sharding rules and multi-process runs."""
