"""Programs that run a peer in its own environment."""
