"""A cache of teachers' embeddings, which are computed once and kept on disk."""
