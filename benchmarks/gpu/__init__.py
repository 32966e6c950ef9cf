"""What only a GPU can show, as one bounded command: `python -m benchmarks.gpu`."""
