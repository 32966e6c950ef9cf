"""Load test of a running server at request rates up to saturation: `python -m benchmarks.load_test --url URL`.

For new images and for repeated images, the offered rate doubles until the server completes less than nine tenths of it; then
one rate in between is tried. Requests arrive at random times, whether or not the server keeps up, but exactly as many as the
rate demands. Each rate gives percentiles of TTFT, TPOT, ITL and end-to-end latency, requests, images and tokens per second,
and the goodput: requests per second within both latency limits. The test prints its progress, stops automatically, and writes
`load.json`, `load.md` and `load.png`.
"""

import argparse
import asyncio
import itertools
import json
import random
import re
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import load
from common.arguments import create_results_folder, positive_integer, positive_number
from common.secrets import redact_url
from dvd.plan.simulation import percentile

_REPEATED_IMAGES = 8
"""Number of distinct images among the repeated ones."""
_SATURATION_SHARE = 0.9
"""Share of the offered rate; a server that completes less is saturated."""
_WARM_UP_RATE, _FIRST_RATE = 1.0, 0.5
"""Requests per second."""
_MAX_DOUBLINGS = 12
_DRAIN_SECONDS = 120.0
_MODELS_TIMEOUT_SECONDS = 10
_TABLE = "load.md"
_PERCENTILES = (0.5, 0.9, 0.99)
UNIQUE, REPEATED = "unique images", "repeated images"
COLOURS = {UNIQUE: "#2462ad", REPEATED: "#d9730d"}
"""Colours of the kinds of images in plots."""
_GREY = "#999999"


@dataclass(frozen=True)
class LoadOptions:
    """Where to send requests, what they contain, and the limits of the goodput.

    Attributes:
        url: Base URL of the server.
        model: Name of the model.
        key: API key; empty for none.
        question: Text of every request.
        size: Width and height of an image.
        images: Images per request.
        tokens: Tokens of every answer.
        seconds: How long each rate is offered.
        ttft: Limit of TTFT in seconds.
        itl: Limit of a request's mean ITL in seconds.
    """

    url: str
    model: str
    key: str
    question: str
    size: tuple[int, int]
    images: int
    tokens: int
    seconds: float
    ttft: float
    itl: float

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that authenticate the requests."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def is_good(self, timing: load.RequestTiming) -> bool:
        """Whether a successful request kept both limits."""
        return timing.ttft <= self.ttft and (not timing.gaps or _mean(timing.gaps) <= self.itl)


@dataclass(frozen=True)
class Point:
    """Result of one offered rate.

    Attributes:
        kind: Kind of images, `UNIQUE` or `REPEATED`.
        offered: Offered requests per second.
        requests: Completed requests per second until the last answer; so are `images`, `tokens` and `goodput`.
        failed: Number of failed requests.
        errors: At most three distinct errors.
        latencies: Seconds by measure and percentile.
    """

    kind: str
    offered: float
    requests: float
    images: float
    tokens: float
    goodput: float
    failed: int
    errors: list[str]
    latencies: dict[str, dict[str, float]]

    @property
    def saturated(self) -> bool:
        """Whether the server could not keep up with the offered rate."""
        return self.requests < _SATURATION_SHARE * self.offered or self.failed > 0


async def measure_rate(options: LoadOptions, kind: str, rate: float, seed: int) -> Point:
    """Offer `rate` requests per second for `options.seconds` and wait at most two more minutes for the answers."""
    count = max(4, round(rate * options.seconds))
    images = _images(options, kind)
    bodies = [_body(options, [next(images) for _ in range(options.images)]) for _ in range(count)]
    rng, progress = random.Random(seed), Progress(kind, rate, count)
    arrivals = sorted(rng.uniform(0, count / rate) for _ in bodies)
    timeout = aiohttp.ClientTimeout(total=count / rate + _DRAIN_SECONDS)
    async with aiohttp.ClientSession(
        timeout=timeout, headers=options.headers, read_bufsize=1 << 20, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        tasks, started_at = [], time.monotonic()
        for body, arrival in zip(bodies, arrivals, strict=True):
            await asyncio.sleep(max(0.0, started_at + arrival - time.monotonic()))
            tasks.append(asyncio.create_task(load.send(session, options.url, body)))
            tasks[-1].add_done_callback(progress.count_request)
        timings = list(await asyncio.gather(*tasks))
    progress.close()
    return _point(options, kind, rate, timings, max(time.monotonic() - started_at, count / rate))


def _images(options: LoadOptions, kind: str) -> Iterator[str]:
    """Endless `data:` URLs. Unique images are new even to a server that was tested before."""
    seeds = itertools.cycle(range(_REPEATED_IMAGES)) if kind == REPEATED else itertools.count(random.getrandbits(48))
    return (load.image_url(seed, *options.size) for seed in seeds)


def _body(options: LoadOptions, images: Sequence[str]) -> bytes:
    usage = {"include_usage": True}
    return load.chat_body(options.model, options.question, images, options.tokens, stream_options=usage)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _point(options: LoadOptions, kind: str, rate: float, timings: Sequence[load.RequestTiming], seconds: float) -> Point:
    completed = [timing for timing in timings if not timing.error]
    latencies = {
        "TTFT": [timing.ttft for timing in completed],
        "TPOT": [_mean(timing.gaps) for timing in completed if timing.gaps],
        "ITL": [gap for timing in completed for gap in timing.gaps],
        "end to end": [timing.duration for timing in completed],
    }
    return Point(
        kind=kind, offered=rate, requests=len(completed) / seconds, images=options.images * len(completed) / seconds,
        tokens=sum(len(timing.token_times) for timing in completed) / seconds,
        goodput=sum(options.is_good(timing) for timing in completed) / seconds, failed=len(timings) - len(completed),
        errors=sorted({timing.error[:200] for timing in timings if timing.error})[:3],
        latencies={
            name: {f"p{int(100 * share)}": percentile(values, share) for share in _PERCENTILES} if values else {}
            for name, values in latencies.items()
        },
    )  # fmt: skip


class Progress:
    """One line of progress per rate on standard error, rewritten in place on a terminal."""

    def __init__(self, kind: str, rate: float, count: int) -> None:
        self._title, self._count, self._done = f"{kind}, {rate:g}/s", count, 0
        self._started_at = time.monotonic()

    def count_request(self, _task: "asyncio.Task[load.RequestTiming]") -> None:
        """Count one ended request."""
        self._done += 1
        if sys.stderr.isatty():
            print(f"\r{self._title}: {self._done}/{self._count} answered", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Print the last line, which is erased by the next line on a terminal."""
        end = "\n" if not sys.stderr.isatty() else "\r\033[K"
        seconds = time.monotonic() - self._started_at
        text = f"{self._title}: {self._done}/{self._count} answered in {seconds:.0f} s"
        print(text, end=end, file=sys.stderr, flush=True)


async def sweep(options: LoadOptions, kind: str, rates: Sequence[float]) -> list[Point]:
    """Measure the given rates or, if there are none, from half a request per second to saturation.

    Points are in ascending order of rates unless rates are given; each is printed as soon as it is measured.
    """
    await measure_rate(options, kind, _WARM_UP_RATE, 999)
    if rates:
        return [_print_row(await measure_rate(options, kind, rate, i)) for i, rate in enumerate(rates)]
    points: list[Point] = []
    rate = _FIRST_RATE
    for i in range(_MAX_DOUBLINGS):
        points.append(_print_row(await measure_rate(options, kind, rate, i)))
        if points[-1].saturated:
            break
        rate *= 2
    between = rate * 0.75
    points.append(_print_row(await measure_rate(options, kind, between, 100)))
    return sorted(points, key=lambda point: point.offered)


def _print_row(point: Point) -> Point:
    print(row(point), flush=True)
    return point


HEAD = (
    "| images | offered/s | requests/s | images/s | tokens/s | goodput/s | failed | TTFT | TPOT | ITL | end to end |\n"
    "|---|---:|---:|---:|---:|---:|---:|---|---|---|---|"
)


def row(point: Point) -> str:
    """A row of the Markdown table; latencies in milliseconds, 50th / 90th / 99th percentile."""
    latencies = [
        " / ".join(f"{1e3 * value:.0f}" for value in by_percentile.values()) or "–"
        for by_percentile in point.latencies.values()
    ]  # fmt: skip
    rates = (point.offered, point.requests, point.images, point.tokens, point.goodput)
    cells = [point.kind.removesuffix(" images"), *(f"{rate:.2f}" for rate in rates), str(point.failed), *latencies]
    return f"| {' | '.join(cells)} |"


def draw(points: Sequence[Point], options: LoadOptions, file: Path) -> None:
    """Plot throughput, goodput, TTFT and ITL against the offered rate."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    throughput, ttft, itl = figure.subplots(1, 3)
    _draw_throughput(throughput, points)
    _draw_latency(ttft, points, "TTFT", options.ttft)
    _draw_latency(itl, points, "ITL", options.itl)
    for axes in (throughput, ttft, itl):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("offered requests/s")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)


def _draw_throughput(axes: Axes, points: Sequence[Point]) -> None:
    for kind, colour in COLOURS.items():
        of_kind = [point for point in points if point.kind == kind]
        offered = [point.offered for point in of_kind]
        axes.plot(offered, [point.requests for point in of_kind], "o-", color=colour, label=f"{kind}: completed")
        axes.plot(offered, [point.goodput for point in of_kind], "o:", color=colour, label=f"{kind}: within limits")
    ends = [min(point.offered for point in points), max(point.offered for point in points)]
    axes.plot(ends, ends, color=_GREY, linewidth=0.8)
    axes.set_ylabel("requests/s")
    axes.legend(frameon=False, fontsize=7)


def _draw_latency(axes: Axes, points: Sequence[Point], measure: str, limit_seconds: float) -> None:
    for kind, colour in COLOURS.items():
        measured = [point for point in points if point.kind == kind and point.latencies[measure]]
        for percentile_name, style in (("p50", "o-"), ("p99", "o:")):
            milliseconds = [1e3 * point.latencies[measure][percentile_name] for point in measured]
            axes.plot([point.offered for point in measured], milliseconds, style, color=colour)
    axes.axhline(1e3 * limit_seconds, color=_GREY, linewidth=0.8)
    axes.set_ylabel(f"{measure}, ms")
    axes.set_title("median (solid), 99th percentile (dotted)", fontsize=8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load test from the command line.

    Returns the exit status: 1 if the server does not answer, or if a request failed with anything but status 429.
    """
    parser = _parser()
    parsed = parser.parse_args(arguments)
    try:
        options = _load_options(parsed)
    except (OSError, LookupError, ValueError) as error:
        problem = redact_url(f"cannot read the models of {parsed.url}: {error}; is the server running?")
        print(problem, file=sys.stderr)
        return 1
    create_results_folder(parser, "--out", parsed.out)
    print(HEAD)
    points = list[Point]()
    for kind in COLOURS:
        points += asyncio.run(sweep(options, kind, parsed.rates))
        _write(points, options, parsed.out)
    print(f"{parsed.out / _TABLE}, load.json, load.png", file=sys.stderr)
    failures = sorted({failure for point in points for failure in point.errors})
    for failure in failures:
        print(f"request failed: {failure}", file=sys.stderr)
    return int(any(not failure.startswith("429") for failure in failures))


def _write(points: Sequence[Point], options: LoadOptions, folder: Path) -> None:
    """Write `load.md`, `load.json` and `load.png`. The API key is not written."""
    (folder / _TABLE).write_text("\n".join([HEAD, *map(row, points), ""]), encoding="utf-8")
    content: dict[str, Any] = {
        "options": {**asdict(options), "key": bool(options.key), "url": redact_url(options.url)},
        "points": [asdict(point) for point in points],
    }  # fmt: skip
    (folder / "load.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draw(points, options, folder / "load.png")


def _image_size(text: str) -> tuple[int, int]:
    """Parse `WIDTHxHEIGHT` in pixels. Raises `ArgumentTypeError`."""
    if match := re.fullmatch("([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text.lower(), re.ASCII):
        return int(match[1]), int(match[2])
    raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT in pixels, as in 896x448, not {text!r}")


def _load_options(parsed: argparse.Namespace) -> LoadOptions:
    """Options of the test. Without --model, the first model that the server lists is used."""
    headers = {"Authorization": f"Bearer {parsed.key}"} if parsed.key else {}
    request = urllib.request.Request(f"{parsed.url}/v1/models", headers=headers)
    with urllib.request.urlopen(request, timeout=_MODELS_TIMEOUT_SECONDS) as response:
        model = parsed.model or json.loads(response.read())["data"][0]["id"]
    return LoadOptions(
        url=parsed.url.rstrip("/"), model=model, key=parsed.key, question=parsed.question, size=parsed.size,
        images=parsed.images, tokens=parsed.tokens, seconds=parsed.seconds, ttft=parsed.ttft, itl=parsed.itl,
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load_test", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="base URL of the server")
    parser.add_argument("--model", default="", help="name of the model; default: the first that the server lists")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument(
        "--rates",
        type=positive_number,
        nargs="*",
        default=[],
        help="requests per second to offer; default: doubling to saturation",
    )
    parser.add_argument("--seconds", type=positive_number, default=20.0, help="how long each rate is offered")
    parser.add_argument("--size", type=_image_size, default="896x448", help="size of an image, WIDTHxHEIGHT in pixels")
    parser.add_argument("--images", type=positive_integer, default=1, help="images per request")
    parser.add_argument("--tokens", type=positive_integer, default=32, help="tokens of every answer")
    parser.add_argument("--question", default="What do you see?", help="text of every request")
    parser.add_argument("--ttft", type=positive_number, default=2.0, help="goodput limit of TTFT in seconds")
    parser.add_argument("--itl", type=positive_number, default=0.2, help="goodput limit of a request's mean ITL in seconds")
    parser.add_argument("--out", type=Path, default=Path("load-results"), help="folder for the table, JSON and plot")
    return parser


if __name__ == "__main__":
    sys.exit(main())
