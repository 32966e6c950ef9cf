"""The fair queue against a model: nothing is lost or served twice, and callers that wait get equal turns."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.fair_queue import FairQueue

_CALLERS = st.sampled_from("ABC")


class FairQueueMachine(RuleBasedStateMachine):
    """Adds, takes and removes items in any order.

    Attributes:
        waiting: Caller and waiting units of each item.
        turns: Units that each caller got since the set of waiting callers changed.
        by_unit: Whether units are taken one by one. A whole item is one turn, for which its caller waits later.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue[int]()
        self.waiting: dict[int, tuple[str, int]] = {}
        self.turns: Counter[str] = Counter()
        self.added = 0
        self.by_unit = True

    @initialize(by_unit=st.booleans())
    def choose(self, by_unit: bool) -> None:
        self.by_unit = by_unit

    def _callers(self) -> set[str]:
        return {caller for caller, _ in self.waiting.values()}

    def _forget_turns(self, before: set[str]) -> None:
        if self._callers() != before:
            self.turns.clear()

    @rule(caller=_CALLERS, units=st.integers(1, 6))
    def add(self, caller: str, units: int) -> None:
        before = self._callers()
        self.added += 1
        self.queue.add(self.added, caller, units)
        self.waiting[self.added] = (caller, units)
        self._forget_turns(before)

    @precondition(lambda self: self.waiting)
    @rule()
    def take(self) -> None:
        before, expected = self._callers(), self.queue.first()
        item = self.queue.take()
        assert item == expected
        caller, units = self.waiting[item]
        self.turns[caller] += 1
        self._drop(item, caller, units - 1)
        turns = [self.turns[name] for name in before]
        assert not self.by_unit or max(turns) - min(turns) <= 2, "turns are equal"
        self._forget_turns(before)

    @precondition(lambda self: self.waiting and not self.by_unit)
    @rule()
    def take_item(self) -> None:
        item = self.queue.take_item()
        del self.waiting[item]

    @rule(number=st.integers(0, 40))
    def remove(self, number: int) -> None:
        before = self._callers()
        _, units = self.waiting.pop(number, ("", 0))
        assert self.queue.remove(number) == units
        self._forget_turns(before)

    @invariant()
    def counts_units(self) -> None:
        assert len(self.queue) == sum(units for _, units in self.waiting.values())

    def _drop(self, item: int, caller: str, units: int) -> None:
        if units:
            self.waiting[item] = (caller, units)
        else:
            del self.waiting[item]

    def teardown(self) -> None:
        while self.waiting:
            self.take_item()
        assert len(self.queue) == 0


TestFairQueue = FairQueueMachine.TestCase
TestFairQueue.settings = settings(max_examples=50, stateful_step_count=40)
