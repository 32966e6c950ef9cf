"""The vision worker: images to visual embeddings, delivered to language workers."""
