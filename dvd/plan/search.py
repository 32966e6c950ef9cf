"""Search for the cheapest fleet that meets the limits of a load."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dvd.plan.model import Costs, Fleet, Load, work
from dvd.plan.simulation import Outcome, percentile, simulate

MAX_WORKERS = 4096
"""Maximum number of workers of one kind."""


class Infeasible(Exception):
    """No number of workers meets the limits. The message says which limit and by how much."""


@dataclass(frozen=True)
class Plan:
    """A fleet, with its outcome at the load's rate and its outcome when saturated."""

    fleet: Fleet
    outcome: Outcome
    saturated: Outcome

    @property
    def bottleneck(self) -> str:
        """The busiest stage when saturated. Lower load hides it: a language worker is busy with any number of sequences."""
        return self.saturated.bottleneck


_MAX_UTILISATION = 0.95
"""Load as a share of the saturated throughput; close to 1, waiting times are unbounded."""


def meets_limits(costs: Costs, load: Load, fleet: Fleet) -> bool:
    """Return whether a fleet meets the latency limits and its queues do not grow."""
    outcome, limits = simulate(costs, load, fleet), load.limits
    in_time = percentile(outcome.ttft, 0.99) <= limits.ttft and percentile(outcome.itl, 0.99) <= limits.itl
    return in_time and load.rate <= _MAX_UTILISATION * simulate_saturated(costs, load, fleet).throughput


def simulate_saturated(costs: Costs, load: Load, fleet: Fleet, in_flight: int = 64) -> Outcome:
    """Return the outcome with a constant number of requests in flight per language worker, independent of the load's rate."""
    total = in_flight * fleet.language
    return simulate(costs, load, fleet, max(400, 4 * total), total)


def cheapest(costs: Costs, load: Load, price: float = 1.0) -> Plan:
    """Return the cheapest fleet that meets the limits.

    Args:
        costs: costs of the stages.
        load: the requests to serve.
        price: price of a vision worker, relative to a language worker.

    Raises:
        Infeasible: no number of workers meets the limits.
    """
    _check_single_request(costs, load)
    vision, language = work(costs, load)
    fleet = Fleet(vision=_min_workers(load.rate * vision), language=_min_workers(load.rate * language))
    while not meets_limits(costs, load, fleet):
        fleet = _grow(costs, load, fleet)
    fleet = _shrink(costs, load, fleet, price)
    return evaluate(costs, load, fleet)


def evaluate(costs: Costs, load: Load, fleet: Fleet) -> Plan:
    """Return the plan with a given fleet."""
    return Plan(fleet, simulate(costs, load, fleet), simulate_saturated(costs, load, fleet))


def _min_workers(busy: float) -> int:
    """Return the workers needed for `busy` seconds of work per second."""
    return max(1, math.ceil(busy))


def _check_single_request(costs: Costs, load: Load) -> None:
    """Raise `Infeasible` if a single request on an idle fleet exceeds a limit: no fleet is faster."""
    single = load.model_copy(update={"rate": 1e-6})
    outcome = simulate(costs, single, Fleet(), requests=50)
    for name, values, limit in (("TTFT", outcome.ttft, load.limits.ttft), ("ITL", outcome.itl, load.limits.itl)):
        if (best := percentile(values, 0.99)) > limit:
            raise Infeasible(f"a request alone has a {name} of {best:.3f} s, above the limit of {limit:g} s")


def _grow(costs: Costs, load: Load, fleet: Fleet) -> Fleet:
    """Return the fleet with one worker, or a tenth, more of the kind that is the bottleneck."""
    slow_tokens = percentile(simulate(costs, load, fleet).itl, 0.99) > load.limits.itl
    language = slow_tokens or simulate_saturated(costs, load, fleet).bottleneck == "language"
    name = "language" if language else "vision"
    count = getattr(fleet, name) + max(1, getattr(fleet, name) // 10)
    if count > MAX_WORKERS:
        raise Infeasible(f"{MAX_WORKERS} {name} workers are not enough")
    return fleet.model_copy(update={name: count})


def _shrink(costs: Costs, load: Load, fleet: Fleet, price: float) -> Fleet:
    """Return the fleet without the workers that it does not need, removing the more expensive kind first."""
    for name in ("vision", "language") if price >= 1 else ("language", "vision"):
        while getattr(fleet, name) > 1:
            smaller = fleet.model_copy(update={name: getattr(fleet, name) - 1})
            if not meets_limits(costs, load, smaller):
                break
            fleet = smaller
    return fleet


@dataclass(frozen=True)
class Advice:
    """Whether decoupling pays for a load, in comparison with colocated workers: vLLM servers that encode images themselves.

    Attributes:
        decouple: False if colocated workers do at least as well.
        reason: one line.
        colocated: the cheapest colocated fleet that meets the limits and costs no more; None if there is none.
    """

    decouple: bool
    reason: str
    colocated: Plan | None


def advise(costs: Costs, load: Load, plan: Plan, price: float = 1.0) -> Advice:
    """Compare the cheapest decoupled fleet with colocated workers. `price`: see `cheapest`. A colocated worker costs 1."""
    budget = plan.fleet.vision * price + plan.fleet.language
    affordable = max(1, int(budget + 1e-9))
    colocated = _cheapest_colocated(costs, load, affordable)
    if colocated is None:
        miss = _describe_miss(costs, load, _colocated(affordable))
        return Advice(True, f"{_servers(affordable)}, at no higher price, would {miss}", None)
    count = colocated.fleet.language
    if count < budget - 1e-9:
        enough = f"{_servers(count)} at a price of {count} {'are' if count > 1 else 'is'} enough"
        return Advice(False, f"{enough}; decoupled workers cost {budget:g}", colocated)
    most, decoupled_most = colocated.saturated.throughput, plan.saturated.throughput
    rates = f"at the same price, {decoupled_most:.2f} requests/s at most, and {most:.2f} with {_servers(count)}"
    return Advice(decoupled_most > most, rates, colocated)


def _cheapest_colocated(costs: Costs, load: Load, most: int) -> Plan | None:
    """Return the plan with the fewest colocated workers, at most `most`, that meet the limits."""
    if not meets_limits(costs, load, _colocated(most)):
        return None
    counts = range(1, most + 1)
    fewest = counts[bisect.bisect_left(counts, True, key=lambda count: meets_limits(costs, load, _colocated(count)))]
    return evaluate(costs, load, _colocated(fewest))


def _colocated(count: int) -> Fleet:
    return Fleet(vision=0, language=count, deployment="colocated")


def _servers(count: int) -> str:
    return f"{count} colocated vLLM server{'s' if count > 1 else ''}"


def _describe_miss(costs: Costs, load: Load, fleet: Fleet) -> str:
    """Return which limit a fleet misses, and by how much."""
    most = simulate_saturated(costs, load, fleet).throughput
    if load.rate > _MAX_UTILISATION * most:
        return f"be saturated: at most {most:.2f} requests/s"
    outcome, limits = simulate(costs, load, fleet), load.limits
    misses = (("TTFT", outcome.ttft, limits.ttft), ("ITL", outcome.itl, limits.itl))
    name, value, limit = max(((n, percentile(v, 0.99), limit) for n, v, limit in misses), key=lambda miss: miss[1] / miss[2])
    return f"miss a limit: {name} p99 {value * 1e3:.0f} ms, limit {limit * 1e3:.0f} ms"


def throughput_by_vision_workers(costs: Costs, load: Load, counts: Sequence[int], language: int) -> list[float]:
    """Return the saturated throughput, in requests per second, for each number of vision workers."""
    return [simulate_saturated(costs, load, Fleet(vision=count, language=language)).throughput for count in counts]
