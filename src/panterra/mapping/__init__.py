"""Maps and embeddings of whole scenes."""
