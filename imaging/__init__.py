"""From an image file to what a network takes: the same pixels in training and in serving."""
