"""Caches of embeddings in a vision worker."""
