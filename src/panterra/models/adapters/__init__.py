"""Other people's networks as encoders."""
