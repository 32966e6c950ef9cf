"""Whether a request may wait: the one rule for the queues of vision workers and of language workers."""

from common import errors
from server.metrics import Metrics


def check_wait(resource: str, work: str, wait: float, max_wait: float, left: float, metrics: Metrics, hint: str = "") -> None:
    """Check that a request does not wait too long.

    Args:
        resource: What is short, `vision` or `language`: the workers in the message, and the metric's label.
        work: What waits, for the message.
        wait: Estimated wait in seconds.
        max_wait: The operator's bound in seconds.
        left: Seconds that the request's deadline leaves for waiting.
        metrics: Where a refusal is counted.
        hint: What the caller can do besides waiting, as the end of a sentence.

    Raises:
        Overloaded: The wait exceeds the bound, or what the deadline leaves; with the time until it would not.
    """
    bound = min(max_wait, left)
    if wait <= bound:
        return
    retry_after = max(1.0, wait - max(bound, 0.0))
    by_deadline = bound < max_wait
    reason = f"its deadline leaves {max(left, 0.0):.1f} s" if by_deadline else f"the queue is bounded to {max_wait:g} s"
    metrics.refused.labels(resource).inc()
    raise errors.Overloaded(
        f"The {resource} workers are at capacity: {work} would wait for about {wait:.1f} s, but {reason}. "
        f"Retry after {retry_after:.0f} s{hint}.",
        retry_after=retry_after,
    )
