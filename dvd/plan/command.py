"""`dvd plan FILE`: compute how many vision and language workers a load needs, and whether decoupling pays."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from common.arguments import positive_integer, positive_number
from dvd.plan import file
from dvd.plan.measure import measure
from dvd.plan.model import Costs, Fleet, Load, work
from dvd.plan.probe import Probe, ProbeError
from dvd.plan.search import (
    MAX_WORKERS,
    Advice,
    Infeasible,
    Plan,
    advise,
    cheapest,
    evaluate,
    simulate_saturated,
    throughput_by_vision_workers,
)
from dvd.plan.simulation import percentile

_STDIN = Path("-")


def main(arguments: Sequence[str]) -> int:
    """Run `dvd plan`. Returns the exit status: 2 for an invalid file or option, 1 if there is no plan."""
    options = _parser().parse_args(arguments)
    try:
        if options.example:
            print(file.example(), end="")
        elif options.server is not None:
            print(measure(Probe(options.server), _report_progress).as_file(options.server), end="")
        else:
            _plan(options)
    except (Infeasible, ProbeError) as error:
        return _fail(str(error), 1)
    except (OSError, ValueError) as error:
        return _fail(f"{'standard input' if options.file == _STDIN else options.file}: {' '.join(str(error).split())}", 2)
    return 0


def _fail(message: str, status: int) -> int:
    print(f"dvd plan: {message}", file=sys.stderr)
    return status


def _report_progress(text: str) -> None:
    print(f"dvd plan: {text}", file=sys.stderr)


def _plan(options: argparse.Namespace) -> None:
    """Print the plan for a file. Raises: `Infeasible`, and `ValueError`, `OSError` for an invalid file."""
    costs, load = read_plan(options.file, options)
    fleet = _fleet(options)
    plan = evaluate(costs, load, fleet) if fleet else cheapest(costs, load, options.vision_price)
    advice = None if fleet else advise(costs, load, plan, options.vision_price)
    if options.json:
        print(json.dumps(_as_json(costs, load, plan, advice), indent=2))
    else:
        print(report(costs, load, plan, advice))
    if options.plot:
        _draw(costs, load, plan, options.plot)


def read_plan(path: Path, options: argparse.Namespace) -> tuple[Costs, Load]:
    """Return the costs and the load of a file; options override the load. Raises: `ValueError`, `OSError`."""
    text = sys.stdin.read() if path == _STDIN else path.read_text(encoding="utf-8")
    overrides = {
        "load": {"rate": options.rate, "compressed": options.compressed},
        "limits": {"ttft": options.ttft, "itl": options.itl},
    }
    set_overrides = {part: {k: v for k, v in values.items() if v is not None} for part, values in overrides.items()}
    content = file.read(text, set_overrides)
    return content.costs, content.load


def _fleet(options: argparse.Namespace) -> Fleet | None:
    if options.vision_workers is None and options.language_workers is None:
        return None
    return Fleet(vision=options.vision_workers or 1, language=options.language_workers or 1)


def report(costs: Costs, load: Load, plan: Plan, advice: Advice | None = None) -> str:
    """Return the plan as text for people. Without an advice, the fleet was given."""
    vision, language = work(costs, load)
    outcome, fleet = plan.outcome, plan.fleet
    colocated_fleet = Fleet(vision=0, language=fleet.vision + fleet.language, deployment="colocated")
    colocated = simulate_saturated(costs, load, colocated_fleet).throughput
    busy = sorted(plan.saturated.busy.items(), key=lambda item: -item[1])
    return "\n".join([
        *([f"answer           {_answer(advice)}"] if advice else []),
        f"a request costs  {vision * 1e3:.1f} ms of a vision worker, {language * 1e3:.1f} ms of a language worker",
        f"workers          {fleet.vision} vision and {fleet.language} language workers",
        f"at {load.rate:g} requests/s  TTFT {_percentiles(outcome.ttft)}, ITL {_percentiles(outcome.itl)}",
        f"saturated        {plan.saturated.throughput:.2f} requests/s; with as many colocated workers: {colocated:.2f}",
        f"bottleneck       {', '.join(f'{stage} {share:.0%} busy' for stage, share in busy)} (when saturated)",
        f"network          {outcome.network * 8 / 1e9:.2f} Gb/s from each vision worker",
    ])  # fmt: skip


def _answer(advice: Advice) -> str:
    return f"{'decouple' if advice.decouple else 'do not decouple'}: {advice.reason}"


def _percentiles(seconds: Sequence[float]) -> str:
    p50, p90, p99 = (percentile(seconds, share) * 1e3 for share in (0.5, 0.9, 0.99))
    return f"{p50:.0f} / {p90:.0f} / {p99:.0f} ms (p50 / p90 / p99)"


def _as_json(costs: Costs, load: Load, plan: Plan, advice: Advice | None) -> dict[str, Any]:
    vision, language = work(costs, load)
    outcome = asdict(plan.outcome)
    for name in ("ttft", "itl"):
        outcome[name] = {str(int(100 * p)): percentile(getattr(plan.outcome, name), p) for p in (0.5, 0.9, 0.99)}
    answer: dict[str, Any] = {"decouple": advice.decouple, "reason": advice.reason} if advice else {}
    if advice and advice.colocated:
        colocated = advice.colocated
        answer["colocated"] = {"workers": colocated.fleet.language, "most": colocated.saturated.throughput}
    return {
        **answer,
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


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line each."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        sys.exit(_fail(f"{message}; see dvd plan --help", 2))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dvd plan", description=__doc__, allow_abbrev=False, epilog="docs/planning.md describes the file.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "file", type=Path, nargs="?", metavar="FILE", help="costs and the load to serve, YAML or JSON; -: standard input"
    )
    source.add_argument("--example", action="store_true", help="print a valid file with a comment on every key, and exit")
    source.add_argument(
        "--from", dest="server", metavar="URL", help="measure the costs of the server at URL, print them as a file, and exit"
    )
    load = parser.add_argument_group("load (overrides the file)")
    load.add_argument("--rate", type=float, metavar="N", help="requests per second")
    load.add_argument("--compressed", type=float, metavar="SHARE", help="share of tiles that the router compresses, 0 to 1")
    load.add_argument("--ttft", type=float, metavar="SECONDS", help="limit of the 99th percentile of the time to first token")
    load.add_argument("--itl", type=float, metavar="SECONDS", help="limit of the 99th percentile of the inter-token latency")
    fleet = parser.add_argument_group("fleet (default: search for the cheapest)")
    fleet.add_argument("--vision-workers", type=_worker_count, metavar="N", help="evaluate this number of vision workers")
    fleet.add_argument("--language-workers", type=_worker_count, metavar="N", help="evaluate this number of language workers")
    fleet.add_argument(
        "--vision-price",
        type=positive_number,
        default=1.0,
        metavar="PRICE",
        help="price of a vision worker; a language worker costs 1",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--plot", type=Path, metavar="PATH", help="plot throughput by number of vision workers, PNG or SVG")
    output.add_argument("--json", action="store_true", help="print the plan as JSON")
    return parser


def _worker_count(text: str) -> int:
    count = positive_integer(text)
    if count > MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"expected at most {MAX_WORKERS} workers, not {text!r}")
    return count


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
