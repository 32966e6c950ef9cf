"""A queue whose callers take turns by units of work: start-time fair queueing. Units are taken one by one, or all of an item.

Every caller has a start tag, the virtual time at which its next unit is due. The caller with the smallest tag is served, and
its tag grows by one over its weight for each unit. A caller that joins starts at the current virtual time: it neither waits for
the backlog of the others, nor is it compensated for the time before. Virtual time passes with every unit, even if each one is
the first of a new caller: those that wait are served in the end. An empty queue remembers whose turn it was, since what was
taken last may still be in service: `forget` tells it when nothing is. docs/decisions/0030-turns-of-callers.md explains why.

The items of one caller are served in the order in which they would finish if they shared the caller's turns equally. So a
small item overtakes a large one, equal items keep their order of arrival, and no item finishes later than with equal shares.
Items of one group, such as the images of a request, have one share together: a small request overtakes a large one, too.
"""

import heapq
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_MAX_STALE_ENTRIES = 64


class _Heap(Generic[T]):
    """The item of the smallest tag first, of equal tags the oldest. Items can be removed, and pushed again with another tag."""

    def __init__(self) -> None:
        self._order = itertools.count()
        self._entries: dict[T, tuple[float, int, T]] = {}
        self._heap: list[tuple[float, int, T]] = []  # removed entries stay until they come up

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, item: T, tag: float) -> None:
        self._entries[item] = entry = (tag, next(self._order), item)
        heapq.heappush(self._heap, entry)

    def first(self) -> T:
        """Return the first item, which stays. Raises: IndexError if there is none."""
        while self._entries.get(self._heap[0][2]) is not self._heap[0]:
            heapq.heappop(self._heap)
        return self._heap[0][2]

    def remove(self, item: T) -> None:
        del self._entries[item]
        if len(self._heap) > 2 * len(self._entries) + _MAX_STALE_ENTRIES:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)


@dataclass
class _Group:
    """Items of a caller that share one turn: how many wait, and when the last of them would finish."""

    finish: float
    items: int = 0


@dataclass(eq=False)
class _Caller(Generic[T]):
    """A caller with waiting items.

    Attributes:
        start: start tag of its next unit, in the queue's virtual time.
        time: virtual time among its groups: the units that each has received, if they have shared equally.
        groups: the groups of its waiting items.
    """

    name: str
    weight: float
    start: float
    time: float = 0.0
    items: _Heap[T] = field(default_factory=_Heap)
    groups: dict[object, _Group] = field(default_factory=dict)

    def add(self, item: T, units: int, group: object) -> None:
        known = self.groups.setdefault(group, _Group(self.time))
        known.items += 1
        known.finish = max(known.finish, self.time) + units
        self.items.push(item, known.finish)

    def remove(self, item: T, group: object) -> None:
        self.items.remove(item)
        self.groups[group].items -= 1
        if not self.groups[group].items:
            del self.groups[group]


@dataclass
class _Waiting(Generic[T]):
    """Where an item waits, and how many of its units."""

    caller: _Caller[T]
    units: int
    group: object


class FairQueue(Generic[T]):
    """Items of one or more units each. Its length is the number of waiting units.

    Args:
        weights: shares of callers relative to each other; 1 for those that are not listed.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = weights or {}
        self._callers: _Heap[_Caller[T]] = _Heap()
        self._by_name: dict[str, _Caller[T]] = {}
        self._items: dict[T, _Waiting[T]] = {}
        self._finish_tags: dict[str, float] = {}  # of callers that have left, while ahead of `_time`; in ascending order
        self._time = 0.0  # about the start tag of what was taken last
        self._taken = 0  # units that were taken last; the time passes with them later: who joins meanwhile is not behind them
        self._weight_beside = 1.0  # most weight that has waited since then
        self._total_weight = 0.0  # of the callers that wait
        self._units = 0

    def __len__(self) -> int:
        return self._units

    def add(self, item: T, caller: str, units: int = 1, group: object = None) -> None:
        """Add an item, which is not in the queue and has at least one unit. Without a `group` it is one of its own."""
        account = self._by_name.get(caller)
        if account is None:
            # a caller that left a moment ago is not served again at once, as if it were new
            start = max(self._time, self._finish_tags.pop(caller, 0.0))
            account = self._by_name[caller] = _Caller(caller, self._weights.get(caller, 1.0), start)
            self._callers.push(account, start)
            self._total_weight += account.weight
            self._weight_beside = max(self._weight_beside, self._total_weight)
        group = item if group is None else group
        account.add(item, units, group)
        self._items[item] = _Waiting(account, units, group)
        self._units += units

    def first(self) -> T:
        """Return the item of the next unit, which stays in the queue. Raises: IndexError if the queue is empty."""
        return self._callers.first().items.first()

    def take(self) -> T:
        """Take the next unit and return its item, which leaves with its last unit. Raises: IndexError if the queue is empty."""
        return self._take(1)

    def take_item(self) -> T:
        """Take all units of the next item and return it. Raises: IndexError if the queue is empty."""
        return self._take(self._items[self.first()].units)

    def _take(self, units: int) -> T:
        caller = self._callers.first()
        item = caller.items.first()
        self._time = max(self._time + self._taken / self._weight_beside, caller.start)
        self._taken, self._weight_beside = units, self._total_weight
        caller.start += units / caller.weight
        caller.time += units / len(caller.groups)
        self._callers.push(caller, caller.start)
        waiting = self._items[item]
        waiting.units -= units
        self._units -= units
        if not waiting.units:
            self._leave(item)
        return item

    def remove(self, item: T) -> int:
        """Remove an item. Returns: the number of its units that waited, 0 if it was not in the queue."""
        waiting = self._items.get(item)
        if waiting is None:
            return 0
        self._units -= waiting.units
        self._leave(item)
        return waiting.units

    def forget(self) -> None:
        """Forget who was served. To be called when all that was taken is done; does nothing while items wait."""
        if not self._units:
            self._finish_tags.clear()
            self._time, self._taken = 0.0, 0

    def _leave(self, item: T) -> None:
        waiting = self._items.pop(item)
        caller = waiting.caller
        caller.remove(item, waiting.group)
        if not caller.items:
            self._callers.remove(caller)
            del self._by_name[caller.name]
            self._total_weight = self._total_weight - caller.weight if self._by_name else 0.0
            self._finish_tags[caller.name] = caller.start
        self._forget_finish_tags()

    def _forget_finish_tags(self) -> None:
        """Forget the callers that have had no advantage, by now, over one that joins."""
        while self._finish_tags and self._finish_tags[name := next(iter(self._finish_tags))] <= self._time:
            del self._finish_tags[name]
