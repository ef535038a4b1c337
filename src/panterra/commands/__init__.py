"""What the longer commands do, step by step."""
