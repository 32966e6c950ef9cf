"""The demo model: its configuration, the trainable module, its initialisation, and the checkpoint files."""
