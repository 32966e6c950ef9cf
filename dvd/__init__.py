"""The `dvd` command."""
