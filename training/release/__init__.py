"""From a trained network to a version that is served: exported, checked, published, taken back."""
