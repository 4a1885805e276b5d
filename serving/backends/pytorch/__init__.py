"""TorchScript for the embedded Triton; Triton reads ``model.py`` from a copy of it."""
