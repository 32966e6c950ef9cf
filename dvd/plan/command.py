"""`dvd plan FILE`: how many vision and language workers to buy."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dvd.plan.model import Costs, Fleet, Load, work
from dvd.plan.search import Impossible, Plan, by_vision_workers, cheapest, planned, saturated
from dvd.plan.simulation import percentile


def main(arguments: Sequence[str]) -> int:
    """The exit status: 2 for a file or an option that cannot be, 1 where no fleet keeps the limits."""
    options = _parser().parse_args(arguments)
    try:
        costs, load = read(options.file, options)
        fleet = _fleet(options)
        plan = planned(costs, load, fleet) if fleet else cheapest(costs, load, options.vision_price)
    except (OSError, ValueError, yaml.YAMLError) as error:
        print(f"dvd plan: {options.file}: {_short(error)}", file=sys.stderr)
        return 2
    except Impossible as error:
        print(f"dvd plan: {error}", file=sys.stderr)
        return 1
    print(json.dumps(_as_json(costs, load, plan), indent=2) if options.json else report(costs, load, plan))
    if options.plot:
        _draw(costs, load, plan, options.plot)
    return 0


def read(file: Path, options: argparse.Namespace) -> tuple[Costs, Load]:
    """Costs and load of a file, the load's words replaced by options that are given. Raises `ValueError`, `OSError`."""
    said = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(said, dict) or set(said) - {"costs", "load"}:
        raise ValueError("expected the keys costs and load")
    load = dict(said.get("load") or {})
    limits = dict(load.get("limits") or {})
    given = {"rate": options.rate, "compressed": options.compressed}
    load |= {name: value for name, value in given.items() if value is not None}
    limits |= {name: value for name, value in (("ttft", options.ttft), ("itl", options.itl)) if value is not None}
    return Costs.model_validate(said.get("costs")), Load.model_validate({**load, "limits": limits})


def _fleet(options: argparse.Namespace) -> Fleet | None:
    if options.vision_workers is None and options.language_workers is None:
        return None
    return Fleet(vision=options.vision_workers or 1, language=options.language_workers or 1)


def _short(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}, got {first['input']!r:.80}"
    return " ".join(str(error).split())


def report(costs: Costs, load: Load, plan: Plan) -> str:
    """For people."""
    vision, language = work(costs, load)
    outcome, fleet = plan.outcome, plan.fleet
    both = Fleet(vision=0, language=fleet.vision + fleet.language, deployment="colocated")
    colocated = saturated(costs, load, both).throughput
    busy = sorted(plan.saturated.busy.items(), key=lambda item: -item[1])
    return "\n".join([
        f"a request costs  vision {vision * 1e3:.1f} ms, language {language * 1e3:.1f} ms of a worker",
        f"buy              {fleet.vision} vision and {fleet.language} language workers",
        f"at {load.rate:g} requests/s  TTFT {_three(outcome.ttft)}, ITL {_three(outcome.itl)}",
        f"at most          {plan.saturated.throughput:.2f} requests/s; as many workers, each doing both: {colocated:.2f}",
        f"bottleneck       {', '.join(f'{stage} {share:.0%} busy' for stage, share in busy)} then",
        f"network          {outcome.network * 8 / 1e9:.2f} Gb/s from each vision worker",
    ])  # fmt: skip


def _three(seconds: Sequence[float]) -> str:
    middle, most, last = (percentile(seconds, share) * 1e3 for share in (0.5, 0.9, 0.99))
    return f"{middle:.0f} / {most:.0f} / {last:.0f} ms (50, 90, 99 of 100)"


def _as_json(costs: Costs, load: Load, plan: Plan) -> dict[str, Any]:
    vision, language = work(costs, load)
    outcome = asdict(plan.outcome)
    for name in ("ttft", "itl"):
        outcome[name] = {str(int(100 * p)): percentile(getattr(plan.outcome, name), p) for p in (0.5, 0.9, 0.99)}
    return {
        "vision_workers": plan.fleet.vision, "language_workers": plan.fleet.language, "most": plan.saturated.throughput,
        "bottleneck": plan.bottleneck, "work": {"vision": vision, "language": language}, **outcome,
    }  # fmt: skip


def _draw(costs: Costs, load: Load, plan: Plan, file: Path) -> None:
    from matplotlib.figure import Figure  # only here: who draws nothing need not have it

    counts = sorted({*range(1, min(8, 2 * plan.fleet.vision) + 1), plan.fleet.vision, 2 * plan.fleet.vision})
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for share, colour in ((0.0, "#2462ad"), (0.5, "#d9730d")):
        rates = by_vision_workers(costs, load.model_copy(update={"compressed": share}), counts, plan.fleet.language)
        axes.plot(counts, rates, marker="o", color=colour, label=f"{share:.0%} of tiles compressed")
    axes.axhline(load.rate, color="#999999", linestyle=":", label="what is to be served")
    axes.set_xlabel(f"vision workers, beside {plan.fleet.language} language workers")
    axes.set_ylabel("requests a second at most")
    axes.set_ylim(bottom=0)
    axes.set_xticks(counts)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dvd plan", description=__doc__)
    parser.add_argument("file", type=Path, help="costs and load, YAML or JSON")
    parser.add_argument("--rate", type=float, help="requests a second, instead of the file's")
    parser.add_argument("--compressed", type=float, help="share of tiles that the router compresses")
    parser.add_argument("--ttft", type=float, help="seconds that 99 of 100 may wait for the first token")
    parser.add_argument("--itl", type=float, help="seconds between two tokens, for 99 of 100")
    parser.add_argument("--vision-workers", type=int, help="price this many instead of searching")
    parser.add_argument("--language-workers", type=int)
    parser.add_argument("--vision-price", type=float, default=1.0, help="of a vision worker, a language worker being 1")
    parser.add_argument("--plot", type=Path, help="draw throughput against the number of vision workers, PNG or SVG")
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
