"""A queue in which flows take turns by the cost of what they have queued: start-time fair queueing (Goyal et al., 1996)."""

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items of several flows. Each flow gets an equal share of the cost that is taken, whatever the others have queued.

    A flow is named by a path, such as (caller, request): callers share equally, and each caller's requests share its part.
    """

    def __init__(self) -> None:
        self._root: _Node[T] = _Node()

    def __len__(self) -> int:
        return self._root.size

    def push(self, flow: tuple[str, ...], cost: float, item: T) -> None:
        """Add an item at the end of its flow."""
        self._root.push(flow, cost, item)

    def peek(self) -> T:
        """Return the item whose turn it is, and leave it in the queue. Raises `IndexError` if the queue is empty."""
        return self._root.peek()

    def pop(self) -> T:
        """Remove and return the item whose turn it is. Raises `IndexError` if the queue is empty."""
        return self._root.pop()[1]

    def discard(self, flow: tuple[str, ...], matches: Callable[[T], bool]) -> None:
        """Remove the items of a flow that match."""
        self._root.discard(flow, matches)


class _Node(Generic[T]):
    """A flow: its own items, or flows inside it."""

    def __init__(self) -> None:
        self.size = 0
        self.start = 0.0  # virtual time at which the flow's next item may be taken
        self._now = 0.0  # virtual time of the flows inside: the start of the one that was taken last
        self._items: deque[tuple[float, T]] = deque()
        self._flows: dict[str, _Node[T]] = {}
        self._ends: dict[str, float] = {}  # where flows that are empty now ended, if that is in the future

    def push(self, flow: tuple[str, ...], cost: float, item: T) -> None:
        self.size += 1
        if not flow:
            self._items.append((cost, item))
            return
        child = self._flows.get(flow[0])
        if child is None:
            child = self._flows[flow[0]] = _Node()
            # never before now: it would take all turns until it has caught up
            child.start = max(self._now, self._ends.pop(flow[0], 0.0))
        child.push(flow[1:], cost, item)

    def peek(self) -> T:
        return self._next()[1].peek() if self._flows else self._items[0][1]

    def pop(self) -> tuple[float, T]:
        if not self._flows:
            cost, item = self._items.popleft()
        else:
            name, child = self._next()
            self._now = child.start
            cost, item = child.pop()
            child.start += cost
            self._remove_if_empty(name, child)
        self.size -= 1
        return cost, item

    def discard(self, flow: tuple[str, ...], matches: Callable[[T], bool]) -> int:
        """Remove items. Returns how many."""
        if not flow:
            kept = [(cost, item) for cost, item in self._items if not matches(item)]
            removed = len(self._items) - len(kept)
            self._items = deque(kept)
        elif flow[0] in self._flows:
            child = self._flows[flow[0]]
            removed = child.discard(flow[1:], matches)
            self._remove_if_empty(flow[0], child)
        else:
            removed = 0
        self.size -= removed
        return removed

    def _next(self) -> "tuple[str, _Node[T]]":
        return min(self._flows.items(), key=lambda named: named[1].start)

    def _remove_if_empty(self, name: str, child: "_Node[T]") -> None:
        if child.size:
            return
        del self._flows[name]
        # remembered, since a flow that comes back with one item at a time would else be ahead of all others each time
        self._ends = {n: end for n, end in self._ends.items() if end > self._now} if self._flows else {}
        if self._flows:
            self._ends[name] = child.start
