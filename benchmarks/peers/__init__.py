"""Other servers with the same model and the same PNGs: ``python -m benchmarks.peers``."""
