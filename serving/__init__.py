"""A real Triton without a container: find, stage, start, watch and stop it."""
