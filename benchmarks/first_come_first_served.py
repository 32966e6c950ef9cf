"""Runs a module of the server with queues that serve in order of arrival, with which benchmarks compare the server's own.

`python -m benchmarks.first_come_first_served MODULE ARGUMENT …`
"""

import runpy
import sys
from collections import OrderedDict
from typing import Any

from common import fair_queue


class ArrivalQueue:
    """Has the methods of `common.fair_queue.FairQueue`; the oldest item is served first, whoever sent it."""

    def __init__(self, _weights: Any = None) -> None:
        self._items: OrderedDict[Any, int] = OrderedDict()

    @classmethod
    def __class_getitem__(cls, _item: Any) -> "type[ArrivalQueue]":
        return cls

    def __len__(self) -> int:
        return sum(self._items.values())

    def add(self, item: Any, _caller: str, units: int = 1, group: object = None) -> None:
        """Add an item with so many units."""
        del group
        self._items[item] = units

    def first(self) -> Any:
        """Return the oldest item. Raises: IndexError if the queue is empty."""
        if not self._items:
            raise IndexError
        return next(iter(self._items))

    def take(self) -> Any:
        """Take a unit of the oldest item. Raises: IndexError if the queue is empty."""
        item = self.first()
        self._items[item] -= 1
        if not self._items[item]:
            del self._items[item]
        return item

    def take_item(self) -> Any:
        """Take the oldest item. Raises: IndexError if the queue is empty."""
        item = self.first()
        del self._items[item]
        return item

    def remove(self, item: Any) -> int:
        """Remove an item. Returns: its units that waited."""
        return self._items.pop(item, 0)

    def forget(self) -> None:
        """Do nothing: the order depends on nobody."""


def main() -> None:
    """Run the module that the first argument names, with the other arguments."""
    fair_queue.FairQueue = ArrivalQueue  # type: ignore[misc, assignment]  # before any module imports it
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
