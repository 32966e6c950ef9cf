"""Questions, answers and their tokenizer."""
