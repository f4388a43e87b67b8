"""Folders as transformers writes them, read and written."""
