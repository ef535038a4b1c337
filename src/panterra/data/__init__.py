"""Data sets: pretraining corpora, one short module per format on disk."""
