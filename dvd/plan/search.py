"""How many workers to buy, and what they would do."""

from collections.abc import Sequence
from dataclasses import dataclass

from dvd.plan.model import Costs, Fleet, Load, work
from dvd.plan.simulation import Outcome, percentile, simulate

MOST = 4096
"""Workers of one kind."""


class Impossible(Exception):
    """No number of workers keeps what is asked; the message says what and by how much."""


@dataclass(frozen=True)
class Plan:
    """A fleet, what it does at the load's rate, and what it does when it always has more to do."""

    fleet: Fleet
    outcome: Outcome
    saturated: Outcome

    @property
    def bottleneck(self) -> str:
        """A language worker is busy at any rate, with few sequences or many: only when all is full does it show."""
        return self.saturated.bottleneck


_SPARE = 0.95
"""Of what a fleet can do; at all of it, waiting has no bound."""


def kept(costs: Costs, load: Load, fleet: Fleet) -> bool:
    """Whether 99 of 100 wait no longer than they may, and nothing piles up."""
    outcome, limits = simulate(costs, load, fleet), load.limits
    in_time = percentile(outcome.ttft, 0.99) <= limits.ttft and percentile(outcome.itl, 0.99) <= limits.itl
    return in_time and load.rate <= _SPARE * saturated(costs, load, fleet).throughput


def saturated(costs: Costs, load: Load, fleet: Fleet, in_flight: int = 64) -> Outcome:
    """With so many in flight for each language worker."""
    at_once = in_flight * fleet.language
    return simulate(costs, load, fleet, max(400, 4 * at_once), at_once)


def cheapest(costs: Costs, load: Load, price: float = 1.0) -> Plan:
    """The least expensive fleet that keeps the limits. `price`: of a vision worker, a language worker being 1.

    Raises `Impossible`.
    """
    _check_alone(costs, load)
    vision, language = work(costs, load)
    fleet = Fleet(vision=_least(load.rate * vision), language=_least(load.rate * language))
    while not kept(costs, load, fleet):
        fleet = _grown(costs, load, fleet)
    fleet = _shrunk(costs, load, fleet, price)
    return planned(costs, load, fleet)


def planned(costs: Costs, load: Load, fleet: Fleet) -> Plan:
    """What a given fleet does."""
    return Plan(fleet, simulate(costs, load, fleet), saturated(costs, load, fleet))


def _least(busy: float) -> int:
    return max(1, int(busy) + (busy > int(busy)))


def _check_alone(costs: Costs, load: Load) -> None:
    """One request by itself is as fast as any fleet can be."""
    alone = load.model_copy(update={"rate": 1e-6})
    outcome = simulate(costs, alone, Fleet(), requests=50)
    for name, values, limit in (("TTFT", outcome.ttft, load.limits.ttft), ("ITL", outcome.itl, load.limits.itl)):
        if (best := percentile(values, 0.99)) > limit:
            raise Impossible(f"a request alone has a {name} of {best:.3f} s, more than the {limit:g} s that it may have")


def _grown(costs: Costs, load: Load, fleet: Fleet) -> Fleet:
    """A worker more, or a tenth more, of the kind that is short."""
    slow = percentile(simulate(costs, load, fleet).itl, 0.99) > load.limits.itl
    language = slow or saturated(costs, load, fleet).bottleneck == "language"
    name = "language" if language else "vision"
    count = getattr(fleet, name) + max(1, getattr(fleet, name) // 10)
    if count > MOST:
        raise Impossible(f"more than {MOST} {name} workers would not do")
    return fleet.model_copy(update={name: count})


def _shrunk(costs: Costs, load: Load, fleet: Fleet, price: float) -> Fleet:
    """Without what can be spared, the more expensive kind first."""
    for name in ("vision", "language") if price >= 1 else ("language", "vision"):
        while getattr(fleet, name) > 1:
            less = fleet.model_copy(update={name: getattr(fleet, name) - 1})
            if not kept(costs, load, less):
                break
            fleet = less
    return fleet


def by_vision_workers(costs: Costs, load: Load, counts: Sequence[int], language: int) -> list[float]:
    """Requests a second, saturated, for each number of vision workers beside so many language workers."""
    return [saturated(costs, load, Fleet(vision=count, language=language)).throughput for count in counts]
