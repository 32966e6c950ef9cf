"""Training batches: their types, how they are generated, and how they are loaded."""
