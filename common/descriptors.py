"""How many files and connections the descriptors of a process allow."""

import resource


def connection_limit(max_connections: int) -> int:
    """Return how many connections this process can have: half of its descriptors are for other things.

    The soft limit of descriptors is raised as far as the system allows.
    """
    return max(1, min(max_connections, raise_limit(2 * max_connections) // 2))


def raise_limit(needed: int) -> int:
    """Raise the soft limit of descriptors to `needed`, as far as the system allows. Returns the soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        soft = min(needed, hard) if hard != resource.RLIM_INFINITY else needed
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft
