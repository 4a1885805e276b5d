"""What the client is made of: images on their way out, the channel, and what comes back."""
