"""The language worker: vLLM's own OpenAI server, and beside it the sink that receives embeddings."""
