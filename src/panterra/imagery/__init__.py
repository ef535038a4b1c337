"""Imagery: scenes, rasters, labels."""
