"""What the clients are made of: one call, one streamer, several of them, and a thread for plain loops."""
