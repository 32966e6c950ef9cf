"""`dvd plan FILE`: compute how many vision and language workers a load needs."""

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
from dvd.plan.search import Infeasible, Plan, cheapest, evaluate, simulate_saturated, throughput_by_vision_workers
from dvd.plan.simulation import percentile


def main(arguments: Sequence[str]) -> int:
    """Run `dvd plan`. Returns the exit status: 2 for an invalid file or option, 1 if no fleet meets the limits."""
    options = _parser().parse_args(arguments)
    try:
        costs, load = read_plan(options.file, options)
        fleet = _fleet(options)
        plan = evaluate(costs, load, fleet) if fleet else cheapest(costs, load, options.vision_price)
    except (OSError, ValueError, yaml.YAMLError) as error:
        print(f"dvd plan: {options.file}: {_short(error)}", file=sys.stderr)
        return 2
    except Infeasible as error:
        print(f"dvd plan: {error}", file=sys.stderr)
        return 1
    print(json.dumps(_as_json(costs, load, plan), indent=2) if options.json else report(costs, load, plan))
    if options.plot:
        _draw(costs, load, plan, options.plot)
    return 0


def read_plan(file: Path, options: argparse.Namespace) -> tuple[Costs, Load]:
    """Return the costs and the load of a file; options override the load. Raises: `ValueError`, `OSError`, `yaml.YAMLError`."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or set(content) - {"costs", "load"}:
        raise ValueError("expected a mapping with the keys costs and load")
    load = dict(content.get("load") or {})
    limits = dict(load.get("limits") or {})
    overrides = {"rate": options.rate, "compressed": options.compressed}
    load |= {name: value for name, value in overrides.items() if value is not None}
    limits |= {name: value for name, value in (("ttft", options.ttft), ("itl", options.itl)) if value is not None}
    return Costs.model_validate(content.get("costs")), Load.model_validate({**load, "limits": limits})


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
    """Return the plan as text for people."""
    vision, language = work(costs, load)
    outcome, fleet = plan.outcome, plan.fleet
    colocated_fleet = Fleet(vision=0, language=fleet.vision + fleet.language, deployment="colocated")
    colocated = simulate_saturated(costs, load, colocated_fleet).throughput
    busy = sorted(plan.saturated.busy.items(), key=lambda item: -item[1])
    return "\n".join([
        f"a request costs  {vision * 1e3:.1f} ms of a vision worker, {language * 1e3:.1f} ms of a language worker",
        f"workers          {fleet.vision} vision and {fleet.language} language workers",
        f"at {load.rate:g} requests/s  TTFT {_percentiles(outcome.ttft)}, ITL {_percentiles(outcome.itl)}",
        f"saturated        {plan.saturated.throughput:.2f} requests/s; with as many colocated workers: {colocated:.2f}",
        f"bottleneck       {', '.join(f'{stage} {share:.0%} busy' for stage, share in busy)} (when saturated)",
        f"network          {outcome.network * 8 / 1e9:.2f} Gb/s from each vision worker",
    ])  # fmt: skip


def _percentiles(seconds: Sequence[float]) -> str:
    p50, p90, p99 = (percentile(seconds, share) * 1e3 for share in (0.5, 0.9, 0.99))
    return f"{p50:.0f} / {p90:.0f} / {p99:.0f} ms (p50 / p90 / p99)"


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
    from matplotlib.figure import Figure  # optional: only --plot needs it

    counts = sorted({*range(1, min(8, 2 * plan.fleet.vision) + 1), plan.fleet.vision, 2 * plan.fleet.vision})
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for share, colour in ((0.0, "#2462ad"), (0.5, "#d9730d")):
        rates = throughput_by_vision_workers(costs, load.model_copy(update={"compressed": share}), counts, plan.fleet.language)
        axes.plot(counts, rates, marker="o", color=colour, label=f"{share:.0%} of tiles compressed")
    axes.axhline(load.rate, color="#999999", linestyle=":", label="load")
    axes.set_xlabel(f"vision workers, with {plan.fleet.language} language workers")
    axes.set_ylabel("requests per second, saturated")
    axes.set_ylim(bottom=0)
    axes.set_xticks(counts)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dvd plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path, metavar="FILE", help="measured costs and the load to serve, YAML or JSON")
    load = parser.add_argument_group("load (overrides the file)")
    load.add_argument("--rate", type=float, metavar="N", help="requests per second")
    load.add_argument("--compressed", type=float, metavar="SHARE", help="share of tiles that the router compresses, 0 to 1")
    load.add_argument("--ttft", type=float, metavar="SECONDS", help="limit of the 99th percentile of the time to first token")
    load.add_argument("--itl", type=float, metavar="SECONDS", help="limit of the 99th percentile of the inter-token latency")
    fleet = parser.add_argument_group("fleet (default: search for the cheapest)")
    fleet.add_argument("--vision-workers", type=int, metavar="N", help="evaluate this number of vision workers")
    fleet.add_argument("--language-workers", type=int, metavar="N", help="evaluate this number of language workers")
    fleet.add_argument(
        "--vision-price", type=float, default=1.0, metavar="PRICE", help="price of a vision worker; a language worker costs 1"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--plot", type=Path, metavar="PATH", help="plot throughput by number of vision workers, PNG or SVG")
    output.add_argument("--json", action="store_true", help="print the plan as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
