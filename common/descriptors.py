"""How many connections the descriptors of a process allow."""

import resource


def connection_limit(max_connections: int) -> int:
    """Return how many connections this process can have: half of its descriptors are for other things.

    The soft limit of descriptors is raised as far as the system allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * max_connections
    if soft < needed:
        soft = min(needed, hard) if hard != resource.RLIM_INFINITY else needed
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(max_connections, soft // 2))
