"""Model classes that vLLM runs in a language worker."""
