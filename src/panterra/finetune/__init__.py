"""A pretrained encoder, taught a task of one's own."""
