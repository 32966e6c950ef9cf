"""The gateway: an OpenAI-compatible HTTP server in front of vision and language workers."""
