"""The language worker: vLLM's own OpenAI server, and the sink, which receives embeddings."""
