"""How often gateways probe workers, and hence how long a worker that is about to stop must still serve."""

POLL_INTERVAL_SECONDS = 0.5
PROBE_TIMEOUT_SECONDS = 1.75
"""Two late probes and the pauses before them are 4.5 s: after this time a worker that hangs is down."""

NOTICE_SECONDS = 3.0
"""Time after a signal in which a worker accepts new requests, and reports that it is draining: every gateway has noticed then,
also one whose probe took nearly its timeout."""
