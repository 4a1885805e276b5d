"""TorchScript for the embedded Triton; Triton has a copy of this folder and reads ``model.py`` there."""
