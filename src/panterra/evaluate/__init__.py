"""What embeddings are worth: probes, splits, metrics."""
