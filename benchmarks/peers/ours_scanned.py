"""This project's program with layers as a loop (`model.unroll=False`)."""

from benchmarks.peers.ours import works
from benchmarks.peers.turns import serve

if __name__ == "__main__":
    serve(works(unroll=False))
