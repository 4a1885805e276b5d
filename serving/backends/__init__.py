"""What the embedded Triton runs models with; read by Triton from a copy."""
