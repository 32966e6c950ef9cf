"""Turns of callers, and the order of one caller's items."""

import random
from collections import Counter

import pytest

from common.fair_queue import FairQueue


def take(queue: FairQueue[str], units: int) -> str:
    """The next units, as letters."""
    return "".join(queue.take() for _ in range(units))


def queue_of(*items: tuple[str, str, int]) -> FairQueue[str]:
    queue = FairQueue[str]()
    for item, caller, units in items:
        queue.add(item, caller, units)
    return queue


def test_callers_take_turns_unit_by_unit() -> None:
    queue = queue_of(("a", "A", 4), ("b", "B", 2), ("c", "C", 3))
    assert take(queue, len(queue)) == "abcabcaca"


def test_the_backlog_of_one_caller_does_not_delay_another() -> None:
    """A sends nine tenths of the units; B has all of its own after as many turns, however B's are split."""
    queue = queue_of(*((f"a{i}", "A", 9) for i in range(10)), *((f"b{i}", "B", 1) for i in range(10)))
    first = Counter(queue.take()[0] for _ in range(20))
    assert first == {"a": 10, "b": 10}
    assert len(queue) == 80


def test_a_caller_that_joins_starts_now_and_not_with_all_the_turns_it_missed() -> None:
    queue = queue_of(("a", "A", 100))
    take(queue, 50)
    queue.add("b", "B", 50)
    assert Counter(take(queue, 20)) == {"a": 10, "b": 10}


def test_a_caller_that_comes_back_at_once_gets_no_second_turn() -> None:
    queue = queue_of(("a", "A", 100))
    order = ""
    for _ in range(10):  # B sends its next unit whenever it has none left
        queue.add("b", "B", 1)
        while "b" not in (taken := queue.take()):
            order += taken
        order += taken
    assert order.count("a") >= 9


def test_turns_are_kept_while_the_queue_is_empty_and_what_was_taken_is_in_service() -> None:
    """A keeps one unit waiting behind the one in service, as the window of a worker does; B sends one after the other."""
    queue, order = queue_of(("a", "A", 1)), ""
    for number in range(60):
        order += queue.take()[0]
        if not queue or queue.first()[0] == "b":
            queue.add(f"a{number}", "A", 1)
        if order[-1] == "a" and len(queue) == 1:
            queue.add(f"b{number}", "B", 1)
    assert order.count("aa") <= 1, "B waits for the unit that is in service, and for no further one"


def test_nobody_has_an_advantage_once_all_that_was_taken_is_done() -> None:
    queue = queue_of(("a", "A", 400))
    queue.take_item()
    queue.forget()
    queue.add("a", "A", 10)
    queue.add("b", "B", 10)
    assert take(queue, 20) == "ab" * 10


def test_turns_are_not_forgotten_while_items_wait() -> None:
    queue = queue_of(("a", "A", 10), ("b", "B", 1))
    assert take(queue, 2) == "ab"
    queue.forget()
    queue.add("b", "B", 10)
    assert take(queue, 2) == "ab"


def test_a_stream_of_new_callers_does_not_starve_one_that_waits() -> None:
    """Each of them would be due at once, if virtual time passed only with the start tags of what is served."""
    queue = queue_of(("a", "A", 5), ("b", "B", 100))
    taken = []
    for number in range(100):
        queue.add(f"n{number}", f"N{number}", 1)
        taken.append(queue.take())
    assert taken.count("a") == 5


def test_weights_are_shares() -> None:
    queue = FairQueue[str]({"A": 3.0})
    queue.add("a", "A", 100)
    queue.add("b", "B", 100)
    assert Counter(take(queue, 40)) == {"a": 30, "b": 10}


def test_a_small_item_overtakes_a_large_one_of_the_same_caller() -> None:
    queue = queue_of(("L", "A", 39))
    take(queue, 3)
    queue.add("s", "A", 1)
    assert take(queue, 2) == "sL"


def test_a_small_item_overtakes_several_large_ones() -> None:
    queue = queue_of(("L", "A", 39), ("M", "A", 39))
    take(queue, 10)
    queue.add("s", "A", 1)
    assert take(queue, 1) == "s"


def test_a_small_request_overtakes_the_many_items_of_a_large_one() -> None:
    queue = FairQueue[str]()
    for number in range(12):
        queue.add(f"L{number}", "A", 1, group="large")
    taken = [queue.take() for _ in range(3)]
    queue.add("s", "A", 1, group="small")
    taken += [queue.take() for _ in range(10)]
    assert taken == ["L0", "L1", "L2", "L3", "s", *(f"L{number}" for number in range(4, 12))]


def test_small_requests_do_not_starve_a_large_one() -> None:
    """One small request after the other: with equal shares the large one would end after twice its units."""
    queue = FairQueue[str]()
    for number in range(20):
        queue.add(f"L{number}", "A", 1, group="large")
    taken = [""]
    for number in range(40):
        if not taken[-1].startswith("L"):
            queue.add(f"s{number}", "A", 1, group=number)
        taken.append(queue.take())
    assert sum(item.startswith("L") for item in taken) >= 19


def test_a_group_whose_items_are_removed_leaves_nothing() -> None:
    queue = FairQueue[str]()
    queue.add("a", "A", 5, group="g")
    queue.add("b", "A", 5, group="g")
    assert queue.remove("a") == 5
    queue.add("c", "A", 1, group="other")
    assert queue.remove("b") == 5
    assert queue.take() == "c"
    assert len(queue) == 0


def test_equal_items_of_a_caller_keep_their_order() -> None:
    queue = queue_of(("a", "A", 3), ("b", "A", 3), ("c", "A", 3))
    assert take(queue, 9) == "aaabbbccc"


def test_small_items_do_not_starve_a_large_one() -> None:
    """One small item after the other: with equal shares the large one would end after twice its units."""
    queue = queue_of(("L", "A", 39))
    taken = []
    for number in range(200):
        queue.add(f"s{number}", "A", 1)
        taken.append(queue.take())
    assert taken.count("L") == 39
    assert 198 - taken[::-1].index("L") <= 3 * 39


@pytest.mark.parametrize("seed", range(5))
def test_no_item_finishes_later_than_with_equal_shares(seed: int) -> None:
    sizes = [random.Random(seed).randint(1, 40) for _ in range(20)]
    queue = FairQueue[int]()
    for item, units in enumerate(sizes):
        queue.add(item, "A", units)
    finished: dict[int, int] = {}
    for number in range(len(queue)):
        finished[queue.take()] = number + 1
    for item, units in enumerate(sizes):
        assert finished[item] <= sum(min(units, other) for other in sizes)


def test_an_item_that_is_removed_leaves_with_all_its_units() -> None:
    queue = queue_of(("a", "A", 5), ("b", "A", 9), ("c", "B", 1))
    assert take(queue, 3) == "aca"
    assert (queue.remove("a"), len(queue)) == (3, 9)
    assert (queue.remove("a"), len(queue)) == (0, 9)
    assert take(queue, 9) == "b" * 9
    assert not queue
    with pytest.raises(IndexError):
        queue.first()


def test_first_is_what_take_takes() -> None:
    queue = queue_of(("a", "A", 2), ("b", "B", 2), ("c", "A", 1))
    while queue:
        first = queue.first()
        assert queue.take() == first


@pytest.mark.parametrize("seed", range(10))
def test_units_are_counted_and_none_is_lost(seed: int) -> None:
    numbers, queue, waiting = random.Random(seed), FairQueue[int](), dict[int, int]()
    for item in range(2000):
        action = numbers.random()
        if action < 0.3:
            waiting[item] = numbers.randint(1, 8)
            queue.add(item, f"caller-{numbers.randint(1, 5)}", waiting[item])
        elif action < 0.4 and waiting:
            victim = numbers.choice(list(waiting))
            assert queue.remove(victim) == waiting.pop(victim)
        elif waiting:
            taken = queue.take()
            waiting[taken] -= 1
            if not waiting[taken]:
                del waiting[taken]
        assert len(queue) == sum(waiting.values())
    rest = Counter(queue.take() for _ in range(len(queue)))
    assert rest == waiting


def test_removed_items_are_forgotten() -> None:
    """Those that never come up too: behind an item that is not served, cancelled ones must not collect."""
    queue = queue_of(("first", "A", 1))
    for number in range(10_000):
        queue.add(f"item {number}", "A", 5)
        queue.add(f"other {number}", f"caller {number}", 5)
        queue.remove(f"item {number}")
        queue.remove(f"other {number}")
    assert len(queue._callers._heap) + len(queue._callers.first().items._heap) + len(queue._finish_tags) < 500


def test_an_item_can_be_taken_whole_and_its_caller_pays_for_all_units() -> None:
    queue = FairQueue[str]()
    for number in range(3):
        queue.add(f"large {number}", "large", 13)
    for number in range(30):
        queue.add(f"small {number}", "small", 1)
    taken = [queue.take_item().split()[0] for _ in range(28)]
    assert taken.count("large") == 2, "26 units"
    assert taken.count("small") == 26
    assert len(queue) == 13 + 4


def test_whole_items_of_one_caller_are_taken_small_ones_first() -> None:
    queue = FairQueue[str]()
    queue.add("large", "caller", 39)
    queue.add("small", "caller", 1)
    assert [queue.take_item(), queue.take_item()] == ["small", "large"]
