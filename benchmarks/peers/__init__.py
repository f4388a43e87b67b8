"""Programs of the CPU suite: the same work by this project and by its peers, each in a process of its own.

    PYTHON -m benchmarks.peers.NAME FOLDER WORK

FOLDER is a PaliGemma as transformers saves it; WORK is a key of the program's `WORKS`. Modules of peers import only
their own packages, numpy and each other, so that they run in environments without JAX or without this project. See
turns.py for what a program reads and prints.
"""
