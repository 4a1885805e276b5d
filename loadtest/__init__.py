"""Measures a running gateway, or Triton itself, the way its callers meet it."""
