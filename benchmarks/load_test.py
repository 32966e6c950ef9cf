"""`python -m benchmarks.load_test --url URL`: what a running server bears, at request rates up to where it saturates.

For each kind of images, new ones each time and ones that come again, the offered rate doubles until less than nine tenths of it
is served, and one rate in between is tried then. Requests arrive at random, whatever the server does, but as many as the rate
says: by chance a short run would have more or fewer. Each rate gives
the percentiles of TTFT, TPOT, ITL and end-to-end latency, requests, images and tokens a second, and the goodput: requests a
second that kept both limits. It says how far it is, stops by itself, and leaves `load.json`, `load.md` and `load.png`.
"""

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
from matplotlib.figure import Figure

from benchmarks import load

_POOL = 8
"""Pictures that come again and again in the repeated kind."""
_SERVED = 0.9
"""Share of the offered rate below which a server is saturated."""
_MOST_DOUBLINGS = 12
_DRAIN = 120.0
KINDS = {"unique images": "#2462ad", "repeated images": "#d9730d"}
_SHARES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Asked:
    """What to send."""

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
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


@dataclass(frozen=True)
class Point:
    """One offered rate. Latencies in seconds, by percentile; rates are those of the answers, until all are there."""

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
        return self.requests < _SERVED * self.offered or self.failed > 0


async def measured(asked: Asked, kind: str, rate: float, seed: int) -> Point:
    """Offer so many requests a second for `asked.seconds`, wait for the answers, at most two minutes more."""
    count = max(4, round(rate * asked.seconds))
    pictures = _pictures(asked, kind)
    bodies = [_body(asked, [next(pictures) for _ in range(asked.images)]) for _ in range(count)]
    rng, progress = random.Random(seed), Progress(kind, rate, count)
    arrivals = sorted(rng.uniform(0, count / rate) for _ in bodies)
    timeout = aiohttp.ClientTimeout(total=count / rate + _DRAIN)
    async with aiohttp.ClientSession(
        timeout=timeout, headers=asked.headers, read_bufsize=1 << 20, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        tasks, began = [], time.monotonic()
        for body, arrival in zip(bodies, arrivals, strict=True):
            await asyncio.sleep(max(0.0, began + arrival - time.monotonic()))
            tasks.append(asyncio.create_task(load.ask(session, asked.url, body)))
            tasks[-1].add_done_callback(progress.ended)
        done = list(await asyncio.gather(*tasks))
    progress.close()
    return _point(asked, kind, rate, done, max(time.monotonic() - began, count / rate))


def _pictures(asked: Asked, kind: str) -> Iterator[str]:
    """New ones are new to a server that was loaded before, too."""
    numbers = itertools.cycle(range(_POOL)) if kind.startswith("repeated") else itertools.count(random.getrandbits(48))
    return (load.picture(number, *asked.size) for number in numbers)


def _body(asked: Asked, pictures: Sequence[str]) -> bytes:
    return load.chat(asked.model, asked.question, pictures, asked.tokens, stream_options={"include_usage": True})


def _point(asked: Asked, kind: str, rate: float, done: Sequence[load.Felt], seconds: float) -> Point:
    good = [felt for felt in done if not felt.error]
    kept = [f for f in good if f.ttft <= asked.ttft and (not f.gaps or sum(f.gaps) / len(f.gaps) <= asked.itl)]
    values = {
        "TTFT": [felt.ttft for felt in good],
        "TPOT": [sum(felt.gaps) / len(felt.gaps) for felt in good if felt.gaps],
        "ITL": [gap for felt in good for gap in felt.gaps],
        "end to end": [felt.ended - felt.began for felt in good],
    }
    return Point(
        kind=kind, offered=rate, requests=len(good) / seconds, images=asked.images * len(good) / seconds,
        tokens=sum(len(felt.tokens) for felt in good) / seconds, goodput=len(kept) / seconds, failed=len(done) - len(good),
        errors=sorted({felt.error[:200] for felt in done if felt.error})[:3],
        latencies={
            name: {f"p{int(100 * share)}": load.percentile(some, share) for share in _SHARES} if some else {}
            for name, some in values.items()
        },
    )  # fmt: skip


class Progress:
    """One line that says how far a rate is, rewritten in place on a terminal."""

    def __init__(self, kind: str, rate: float, count: int) -> None:
        self._what, self._count, self._done = f"{kind}, {rate:g}/s", count, 0
        self._began = time.monotonic()

    def ended(self, _task: "asyncio.Task[load.Felt]") -> None:
        self._done += 1
        if sys.stderr.isatty():
            print(f"\r{self._what}: {self._done}/{self._count} answered", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        end = "\n" if not sys.stderr.isatty() else "\r\033[K"
        took = time.monotonic() - self._began
        print(f"{self._what}: {self._done}/{self._count} answered in {took:.0f} s", end=end, file=sys.stderr, flush=True)


async def swept(asked: Asked, kind: str, rates: Sequence[float]) -> list[Point]:
    """At the given rates, or, without any, from half a request a second to saturation."""
    await measured(asked, kind, 1.0, 999)  # warms what is not warm
    if rates:
        return [_told(await measured(asked, kind, rate, i)) for i, rate in enumerate(rates)]
    found: list[Point] = []
    rate = 0.5
    for i in range(_MOST_DOUBLINGS):
        found.append(_told(await measured(asked, kind, rate, i)))
        if found[-1].saturated:
            break
        rate *= 2
    between = rate * 0.75
    return sorted([*found, _told(await measured(asked, kind, between, 100))], key=lambda point: point.offered)


def _told(point: Point) -> Point:
    print(row(point), flush=True)
    return point


HEAD = (
    "| images | offered/s | requests/s | images/s | tokens/s | goodput/s | failed | TTFT | TPOT | ITL | end to end |\n"
    "|---|---:|---:|---:|---:|---:|---:|---|---|---|---|"
)


def row(point: Point) -> str:
    """A line of the table; latencies in ms: 50th / 90th / 99th percentile."""
    latencies = [
        " / ".join(f"{1e3 * value:.0f}" for value in of.values()) or "–" for of in point.latencies.values()
    ]  # fmt: skip
    rates = (point.offered, point.requests, point.images, point.tokens, point.goodput)
    cells = [point.kind.removesuffix(" images"), *(f"{rate:.2f}" for rate in rates), str(point.failed), *latencies]
    return f"| {' | '.join(cells)} |"


def draw(points: Sequence[Point], asked: Asked, file: Path) -> None:
    """Served and good requests, TTFT and ITL against the offered rate."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    served, ttft, itl = figure.subplots(1, 3)
    for kind, colour in KINDS.items():
        some = [point for point in points if point.kind == kind]
        offered = [point.offered for point in some]
        served.plot(offered, [point.requests for point in some], "o-", color=colour, label=f"{kind}, served")
        served.plot(offered, [point.goodput for point in some], "o:", color=colour, label=f"{kind}, within limits")
        for axes, name in ((ttft, "TTFT"), (itl, "ITL")):
            known = [point for point in some if point.latencies[name]]
            for share, style in (("p50", "o-"), ("p99", "o:")):
                heights = [1e3 * point.latencies[name][share] for point in known]
                axes.plot([point.offered for point in known], heights, style, color=colour)
    most = max(point.offered for point in points)
    least = min(point.offered for point in points)
    served.plot([least, most], [least, most], color="#999999", linewidth=0.8)
    served.set_yscale("log")
    served.set_ylabel("requests/s")
    for axes, limit, name in ((ttft, asked.ttft, "TTFT"), (itl, asked.itl, "ITL")):
        axes.axhline(1e3 * limit, color="#999999", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_ylabel(f"{name}, ms: 50th percentile, and 99th (dotted)")
    for axes in (served, ttft, itl):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("offered requests/s")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
    served.legend(frameon=False, fontsize=7)
    figure.savefig(file, dpi=130)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 where the server does not answer, or a request failed otherwise than by being refused (429)."""
    said = _parser().parse_args(arguments)
    try:
        asked = _asked(said)
    except (OSError, LookupError, ValueError) as error:
        print(f"no server to load at {said.url}: {error}", file=sys.stderr)
        return 1
    print(HEAD)
    points = [point for kind in KINDS for point in asyncio.run(swept(asked, kind, said.rates))]
    said.out.mkdir(parents=True, exist_ok=True)
    table = "\n".join([HEAD, *map(row, points), ""])
    (said.out / "load.md").write_text(table, encoding="utf-8")
    whole: dict[str, Any] = {"asked": {**asdict(asked), "key": bool(asked.key)}, "points": [asdict(point) for point in points]}
    (said.out / "load.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    draw(points, asked, said.out / "load.png")
    print(f"{said.out / 'load.md'}, load.json, load.png", file=sys.stderr)
    reasons = sorted({why for point in points for why in point.errors})
    for why in reasons:
        print(f"failed: {why}", file=sys.stderr)
    return int(any(not why.startswith("429") for why in reasons))


def _asked(said: argparse.Namespace) -> Asked:
    headers = {"Authorization": f"Bearer {said.key}"} if said.key else {}
    with urllib.request.urlopen(urllib.request.Request(f"{said.url}/v1/models", headers=headers), timeout=10) as answer:
        model = said.model or json.loads(answer.read())["data"][0]["id"]
    width, height = (int(part) for part in said.size.lower().split("x"))
    return Asked(
        url=said.url.rstrip("/"), model=model, key=said.key, question=said.question, size=(width, height), images=said.images,
        tokens=said.tokens, seconds=said.seconds, ttft=said.ttft, itl=said.itl,
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load_test", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="", help="the first that is served")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="requests a second; none: doubling to saturation")
    parser.add_argument("--seconds", type=float, default=20.0, help="to offer each rate for")
    parser.add_argument("--size", default="896x448", help="of a picture, WIDTHxHEIGHT")
    parser.add_argument("--images", type=int, default=1, help="in a request")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, exactly")
    parser.add_argument("--question", default="What do you see?")
    parser.add_argument("--ttft", type=float, default=2.0, help="limit for the goodput, seconds")
    parser.add_argument("--itl", type=float, default=0.2, help="limit of a request's mean, seconds")
    parser.add_argument("--out", type=Path, default=Path("load-results"), help="folder for table, JSON and plot")
    return parser


if __name__ == "__main__":
    sys.exit(main())
