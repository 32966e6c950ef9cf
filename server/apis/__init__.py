"""Bodies of requests: one file for what all have in common (`body`), one for the dial, one an API."""
