"""What a trained network is worth: measured, assessed, and shown in a report."""
