"""HTTP of the gateway: admission, authentication, deadlines, bodies, streams, errors."""
