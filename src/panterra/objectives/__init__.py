"""Objectives: from views of a batch to a loss."""
