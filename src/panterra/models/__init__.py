"""Models: from a batch to features."""
