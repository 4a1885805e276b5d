"""What the embedded Triton runs models with; read by Triton, not imported by Sluice."""
