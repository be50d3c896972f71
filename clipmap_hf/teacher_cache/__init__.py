"""The embeddings of frozen teachers, computed once and kept."""
