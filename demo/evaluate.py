"""Measure a served model on pictures it was never trained on: `python -m demo.evaluate --url http://127.0.0.1:8000`.

Three parts, greedy, over the gateway's HTTP:

1. accuracy  every task, with the fonts and textures of training and with others; small talk apart
2. router    the same pictures of many tiles with the router off, as it decides, and with every tile compressed
3. curve     those pictures again while the router's thresholds move

Every answer goes into answers.jsonl as it comes. Stop with ctrl-C; the same command asks what is missing. The file knows a
model by its name only: delete it when other weights are served under the same one.
"""

import argparse
import asyncio
import base64
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import aiohttp
import numpy as np

from demo import scenes
from demo.files import write_json
from demo.scenes import Scene, Style
from demo.words import Asked, blind, compared, questions, small_talk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEED = 2_000_000_000
"""First word of every generator's seed here. Training begins with its own, far below."""
TOKENS, COMPRESSED = 256, 64
"""Visual tokens of a tile."""
MAX_TOKENS = 64
SINGLE = ("colour", "shape", "count", "place", "presence", "number")
TASKS = (*SINGLE, "same")
NEAR = "same, one change"
STYLES = {"trained": Style(), "held out": Style(held_out=True)}
STREAMS = ("trained", "held out", "trained pairs", "held out pairs", "text", "router", "trained near", "held out near")
"""Names of groups; each has its own seeds, by its place here: add new ones at the end."""
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before a request that found the server busy or away is sent again."""

Json = dict[str, Any]


class Failed(Exception):
    """Measuring cannot go on; the message says why."""


# What is asked


@dataclass(frozen=True)
class Setting:
    """Of the router, `vir` as a request says it; None leaves it to the server."""

    name: str
    vir: Mapping[str, Any] | None = None


def _thresholds(relative: float, absolute: float) -> Setting:
    vir = {"mode": "auto", "relative_threshold": relative, "absolute_threshold": absolute}
    return Setting(f"relative {relative:g}, absolute {absolute:g}", vir)


SERVERS = Setting("server's own")
ROUTER = tuple(Setting(mode, {"mode": mode}) for mode in ("off", "auto", "all"))
BY_ABSOLUTE = tuple(_thresholds(0, value) for value in (0, 0.1, 0.25, 0.5, 0.75, 0.9))
BY_RELATIVE = tuple(_thresholds(value, 0.5) for value in (0.2, 0.4, 0.6, 0.8))
CURVE = (*BY_ABSOLUTE, *BY_RELATIVE)


@dataclass(frozen=True)
class Item:
    """One request. `name` tells it from all others, also from those of a generator that has changed."""

    name: str
    setting: Setting
    asked: Asked


@dataclass(frozen=True)
class Group:
    """Questions about the same images. One after another, so that the engine reads the images once."""

    stream: str
    index: int
    asked: tuple[Asked, ...]
    scenes: tuple[Scene, ...] = ()
    style: Style = field(default_factory=Style)
    settings: tuple[Setting, ...] = (SERVERS,)

    @property
    def items(self) -> list[Item]:
        shown = hashlib.blake2b(repr(self.scenes).encode(), digest_size=6).hexdigest()
        return [
            Item(f"{self.stream}/{self.index}/{shown}/{setting.name}/{asked.question}/{asked.answer}", setting, asked)
            for setting in self.settings
            for asked in self.asked
        ]

    @property
    def full(self) -> int:
        """Visual tokens if no tile is compressed."""
        return TOKENS * sum(len(scenes.windows(scene, self.style)) for scene in self.scenes)


def generator(stream: str, index: int, *more: int) -> np.random.Generator:
    return np.random.default_rng([SEED, STREAMS.index(stream), index, *more])


def plan_accuracy(n: int, talk: int) -> Iterator[Group]:
    """`n` questions of each task in either style, `talk` without an image.

    Of pairs as many more as a fifth of `n` differ in one thing only, and are counted apart.
    """
    for stream, style in STYLES.items():
        yield from _single(stream, style, n)
        for index in range(n):
            rng = generator(f"{stream} pairs", index)
            first, second = scenes.pair(rng, style, int(rng.choice(scenes.TILES)))
            yield Group(f"{stream} pairs", index, (compared(first == second),), (first, second), style)
        for index in range(n // 5):
            rng = generator(f"{stream} near", index)
            two = scenes.near_pair(rng, style, int(rng.choice(scenes.TILES)))
            yield Group(f"{stream} near", index, (replace(compared(False), task=NEAR),), two, style)
    yield from _text(talk)


def _single(stream: str, style: Style, n: int) -> Iterator[Group]:
    """A task that has its `n` questions is asked no more: later pictures are only for what fewer pictures can be asked."""
    left = dict.fromkeys(SINGLE, n)
    for index in itertools.count():
        if not any(left.values()):
            return
        rng = generator(stream, index)
        scene = scenes.scene(rng, style)
        asked = tuple(found for found in questions(scene, rng) if left[found.task])
        for found in asked:
            left[found.task] -= 1
        if asked:
            yield Group(stream, index, asked, (scene,), style)


def _text(count: int) -> Iterator[Group]:
    """No question twice; a third of them about an image that is not there, which can be asked in 76 ways."""
    seen: set[str] = set()
    for index in itertools.count():
        if len(seen) == count:
            return
        rng = generator("text", index)
        if len(seen) < min(count // 3, 50):
            asked = replace(blind(rng), task="no image")
        else:
            asked = replace(small_talk(rng), task="small talk")
        if asked.question not in seen:
            seen.add(asked.question)
            yield Group("text", index, (asked,))


def plan_router(pictures: int, settings: tuple[Setting, ...]) -> Iterator[Group]:
    """Pictures of two tiles and more. Four of five have a number: digits are what compression may cost."""
    for index in range(pictures):
        rng = generator("router", index)
        tiles = int(rng.choice([count for count in scenes.TILES if count > 1]))
        scene = scenes.scene(rng, Style(), tiles)
        while index % 5 and scene.number is None:
            scene = scenes.scene(rng, Style(), tiles)
        asked = dict.fromkeys([*questions(scene, rng), *questions(scene, rng)])  # twice: the second often asks of other things
        yield Group("router", index, tuple(asked), (scene,), settings=settings)


def data_urls(group: Group) -> list[str]:
    """The images as a request has them. Equal scenes become equal files: both of a pair are encoded alike."""
    urls = []
    for scene in group.scenes:
        data = scenes.encoded(scenes.draw(scene), generator(group.stream, group.index, 1))
        kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
        urls.append(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")
    return urls


# What was answered


@dataclass(frozen=True)
class Record:
    """A line of the file of answers. `tokens` of the images as the gateway counts them, `full` with nothing compressed."""

    name: str
    model: str
    stream: str
    index: int
    setting: str
    task: str
    question: str
    expected: str
    answer: str
    tokens: int | None
    full: int

    @property
    def right(self) -> bool:
        return self.answer.strip() == self.expected


class Answers:
    """The file of answers, of one model. What breaks off at its end, because a machine went down, is cut away."""

    def __init__(self, file: Path, model: str) -> None:
        self.model = model
        self._found: dict[str, Record] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = file.read_bytes() if file.exists() else b""
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            os.truncate(file, end)
        for line in whole[:end].splitlines():
            record = Record(**json.loads(line))
            if record.model == model:
                self._found[record.name] = record
        self._file = file.open("a", encoding="utf-8")

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, item: Item) -> bool:
        return item.name in self._found

    def add(self, record: Record) -> None:
        self._found[record.name] = record
        self._file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
        self._file.flush()

    def of(self, groups: Iterable[Group]) -> list[Record]:
        return [self._found[item.name] for group in groups for item in group.items if item in self]


# Asking


class Progress:
    """How far a part is, how much is right, and the time left: in one line of a terminal, elsewhere a line now and then."""

    def __init__(self, part: str, total: int, records: Sequence[Record], stream: TextIO | None = None) -> None:
        self._part, self._total, self._stream = part, total, stream or sys.stderr
        self._there = self._done = len(records)
        self._right = sum(record.right for record in records)
        self._began = time.monotonic()
        self._told = -math.inf

    def step(self, right: bool) -> None:
        self._done += 1
        self._right += right
        now, shown = time.monotonic(), self._stream.isatty()
        if now - self._told >= (0.2 if shown else 15) or self._done == self._total:
            self._told = now
            print(("\r\x1b[K" if shown else "") + self._line(now), end="" if shown else "\n", file=self._stream, flush=True)

    def _line(self, now: float) -> str:
        pace = (now - self._began) / max(1, self._done - self._there)
        left = timed(pace * (self._total - self._done))
        return f"{self._part} {self._done}/{self._total}  {left} left  {self._right / max(1, self._done):.1%} right"

    def end(self) -> None:
        if self._stream.isatty():
            print(file=self._stream)


def timed(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class Client:
    """Asks one server, and the model that it serves first."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url.rstrip("/")
        self.model = ""

    async def describe(self) -> Json:
        """Model and versions, for the results."""
        self.model = str((await self._patiently("GET", "/v1/models"))[0]["data"][0]["id"])
        return {"model": self.model, **(await self._patiently("GET", "/version"))[0]}

    async def ask(self, group: Group, item: Item, urls: Sequence[str]) -> Record:
        text = item.asked.question
        parts = [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]
        body = {
            "model": self.model, "temperature": 0, "max_tokens": MAX_TOKENS,
            "messages": [{"role": "user", "content": parts if urls else text}],
            **({"vir": item.setting.vir} if item.setting.vir else {}),
        }  # fmt: skip
        said, headers = await self._patiently("POST", "/v1/chat/completions", body)
        record = Record(
            item.name, self.model, group.stream, group.index, item.setting.name, item.asked.task, text, item.asked.answer,
            said["choices"][0]["message"]["content"] or "", _tokens(headers), group.full,
        )  # fmt: skip
        _check_heeded(item.setting, record)
        return record

    async def _patiently(self, method: str, path: str, body: Json | None = None) -> tuple[Any, Mapping[str, str]]:
        """JSON and headers of a good answer; a busy server, or one that is away, is asked again. Raises `Failed`."""
        for pause in (*PAUSES, None):
            wait = pause
            try:
                async with self._session.request(method, self._url + path, json=body) as answer:
                    if answer.status == 200:
                        return await answer.json(), answer.headers
                    trouble = f"{answer.status}: {(await answer.text())[:500]}"
                    if answer.status not in (429, 502, 503, 504):
                        break
                    with suppress(ValueError):
                        wait = min(30.0, float(answer.headers.get("Retry-After", ""))) if pause else None
            except (aiohttp.ClientError, TimeoutError) as error:
                trouble = f"{type(error).__name__}: {error}"
            if wait is not None:
                await asyncio.sleep(wait)
        raise Failed(f"{method} {self._url}{path} is answered {trouble}")


def _tokens(headers: Mapping[str, str]) -> int | None:
    """Of `X-DvD-Images`, such as `images=1; tiles=7; compressed=3; tokens=1216; reused=0`."""
    said = dict(pair.split("=", 1) for pair in headers.get("X-DvD-Images", "").split("; ") if "=" in pair)
    return int(said["tokens"]) if "tokens" in said else None


def _check_heeded(setting: Setting, record: Record) -> None:
    """A server that passes over `vir` would look like a router that costs nothing. Raises `Failed`."""
    if setting.vir is None:
        return
    if record.tokens is None:
        raise Failed("the server does not say in X-DvD-Images how many visual tokens it made: is it dvd-serve?")
    least, most = {"off": (record.full, record.full), "all": (record.full * COMPRESSED // TOKENS,) * 2}.get(
        setting.name, (record.full * COMPRESSED // TOKENS, record.full)
    )
    if not least <= record.tokens <= most:
        raise Failed(
            f"with vir {dict(setting.vir)} an image of {record.full // TOKENS} tiles has {record.tokens} visual tokens,"
            f" not {least} to {most}: the server does not heed it, or its checkpoint has no router"
        )


async def ask_all(client: Client, part: str, groups: Sequence[Group], answers: Answers, in_flight: int) -> None:
    """Ask what `answers` lacks, as many groups at a time as `in_flight`. Raises `Failed`."""
    lacking = [group for group in groups if any(item not in answers for item in group.items)]
    progress = Progress(part, sum(len(group.items) for group in groups), answers.of(groups))
    waiting = iter(lacking)

    async def work() -> None:
        for group in waiting:
            urls = await asyncio.to_thread(data_urls, group)
            for item in group.items:
                if item not in answers:
                    record = await client.ask(group, item, urls)
                    answers.add(record)
                    progress.step(record.right)

    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(in_flight):
                workers.create_task(work())
    except ExceptionGroup as found:
        raise found.exceptions[0] from None
    finally:
        progress.end()


# Results


def wilson(right: int, n: int) -> tuple[float, float]:
    """Bounds of the share that `right` of `n` stand for, with 95 % confidence."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959964
    share, scale = right / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def scored(records: Sequence[Record]) -> Json:
    right, n = sum(record.right for record in records), len(records)
    low, high = wilson(right, n)
    return {"n": n, "right": right, "share": round(right / n, 4) if n else None, "interval": [round(low, 4), round(high, 4)]}


def by_task(records: Sequence[Record]) -> Json:
    """Of all together, and of each task that was asked."""
    tasks = sorted({record.task for record in records}, key=lambda task: TASKS.index(task) if task in TASKS else len(TASKS))
    return {"all": scored(records), **{task: scored([r for r in records if r.task == task]) for task in tasks}}


def kept(records: Sequence[Record]) -> Json:
    """Visual tokens of the pictures, each counted once however often it was asked about."""
    pictures = {record.index: record for record in records}.values()
    tokens, full = sum(record.tokens or 0 for record in pictures), sum(record.full for record in pictures)
    return {"pictures": len(pictures), "tokens": tokens, "full": full, "kept": round(tokens / full, 4) if full else None}


def accuracy(records: Sequence[Record]) -> Json:
    found = {name: by_task([r for r in records if r.stream in (name, f"{name} pairs")]) for name in STYLES}
    near = {name: scored([r for r in records if r.stream == f"{name} near"]) for name in STYLES}
    return {"styles": found, "near": near, "text": by_task([r for r in records if r.stream == "text"])}


def per_setting(records: Sequence[Record], settings: Iterable[Setting]) -> Json:
    found = []
    for setting in settings:
        chosen = [record for record in records if record.setting == setting.name]
        found.append({"setting": setting.name, "vir": setting.vir, **kept(chosen), "tasks": by_task(chosen)})
    return {"settings": found}


def percent(score: Json | None) -> str:
    """Such as `97.4 (95.6 to 98.5)`."""
    if not score or not score["n"]:
        return "–"
    low, high = score["interval"]
    return f"{100 * score['share']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracy_table(found: Json) -> str:
    styles = found["styles"]
    rows = [[task, *(percent(styles[name].get(task)) for name in STYLES)] for task in ("all", *TASKS)]
    rows.append([NEAR, *(percent(found["near"].get(name)) for name in STYLES)])
    rows += [[task, percent(score), "–"] for task, score in found["text"].items() if task != "all"]
    return table(["% right (95 % interval)", *STYLES], rows)


def router_table(found: Json) -> str:
    names = ["all", *SINGLE]
    rows = [
        [s["setting"], f"{100 * s['kept']:.1f}", *(percent(s["tasks"].get(task)) for task in names)] for s in found["settings"]
    ]
    return table(["router", "% of visual tokens", *names], rows)


# Figures


BLUE, ORANGE, INK, FAINT = "#2462ad", "#d9730d", "#333333", "#dddddd"


def _axes(width: float, height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure  # only here: matplotlib takes a while to come

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.tick_params(colors=INK, length=0)
    return figure, axes


def _saved(figure: "Figure", file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Software": None})


def draw_accuracy(found: Json, file: Path) -> None:
    """Two bars a task, with their intervals."""
    figure, axes = _axes(8, 3.6)
    labels = {"trained": "fonts and backgrounds of training", "held out": "fonts and backgrounds never trained on"}
    for offset, colour, (name, label) in zip((-0.2, 0.2), (BLUE, ORANGE), labels.items(), strict=True):
        scores = [found["styles"][name].get(task, scored([])) for task in TASKS]
        heights = [100 * (score["share"] or 0) for score in scores]
        reach = [[max(0.0, h - 100 * s["interval"][0]) for h, s in zip(heights, scores, strict=True)],
                 [max(0.0, 100 * s["interval"][1] - h) for h, s in zip(heights, scores, strict=True)]]  # fmt: skip
        places = [i + offset for i in range(len(TASKS))]
        axes.bar(places, heights, 0.36, color=colour, label=label, yerr=reach, ecolor=INK, error_kw={"linewidth": 1})
        for place, height in zip(places, heights, strict=True):
            axes.text(place, 2, f"{height:.0f}", color="white", ha="center", fontsize=8)
    axes.set_xticks(range(len(TASKS)), TASKS)
    axes.set_ylim(0, 100)
    axes.set_ylabel("% answered right", color=INK)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    _saved(figure, file)


def draw_curve(found: Json, file: Path) -> None:
    """Accuracy against visual tokens kept: all questions and numbers, either threshold moving; the three modes marked."""
    figure, axes = _axes(8, 4.4)
    by_name = {setting["setting"]: setting for setting in found["settings"]}
    drawn: list[float] = []
    for task, colour, label in (("all", BLUE, "all questions"), ("number", ORANGE, "numbers")):
        for settings, line, moving in ((BY_ABSOLUTE, "-", "absolute"), (BY_RELATIVE, "--", "relative")):
            points = sorted(_point(by_name[setting.name], task) for setting in settings)
            xs, ys = zip(*points, strict=True)
            said = f"{label}, {moving} threshold moving"
            axes.plot(xs, ys, line, color=colour, marker="o", markersize=3.5, linewidth=1.5, label=said)
            drawn += ys
        for setting, marker in zip(ROUTER, "s*D", strict=True):
            x, y = _point(by_name[setting.name], task)
            axes.plot(x, y, marker, color=colour, markersize=13 if marker == "*" else 8, markeredgecolor="white")
            if not math.isnan(y):
                axes.annotate(setting.name, (x, y), (0, 9), textcoords="offset points", ha="center", color=INK, fontsize=9)
            drawn.append(y)
    known = [y for y in drawn if not math.isnan(y)]
    axes.set_ylim(max(0.0, min(known, default=0) - 6), min(106.0, max(known, default=100) + 6))
    axes.set_xlim(20, 105)
    axes.set_xlabel("% of visual tokens kept", color=INK)
    axes.set_ylabel("% answered right", color=INK)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    _saved(figure, file)


def _point(setting: Json, task: str) -> tuple[float, float]:
    share = setting["tasks"].get(task, scored([]))["share"]
    return 100 * setting["kept"], math.nan if share is None else 100 * share


# All of it


async def measure(options: argparse.Namespace) -> None:
    """Raises `Failed`."""
    async with AsyncExitStack() as held:
        session = await held.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=900)))
        client = Client(session, options.url)
        head: Json = {"date": datetime.now(UTC).date().isoformat(), "server": await client.describe(), "seed": SEED}
        answers = held.enter_context(Answers(options.out / "answers.jsonl", client.model))

        async def asked(part: str, groups: list[Group]) -> list[Record]:
            if there := len(answers.of(groups)):
                print(f"{part}: {there} answers are there already", file=sys.stderr)
            await ask_all(client, part, groups, answers, options.in_flight)
            return answers.of(groups)

        if "accuracy" in options.parts:
            found = accuracy(await asked("accuracy", list(plan_accuracy(options.n, options.talk))))
            write_json(options.out / "accuracy.json", {**head, "questions per task": options.n, **found})
            draw_accuracy(found, options.images / "accuracy.png")
            print(accuracy_table(found), end="\n\n")
        if "router" in options.parts or "curve" in options.parts:  # the curve has the three modes on it
            records = await asked("router", list(plan_router(options.pictures, ROUTER)))
            found = per_setting(records, ROUTER)
            write_json(options.out / "router.json", {**head, "pictures": options.pictures, **found})
            print(router_table(found), end="\n\n")
        if "curve" in options.parts:
            records += await asked("curve", list(plan_router(options.pictures, CURVE)))
            found = per_setting(records, (*ROUTER, *CURVE))
            write_json(options.out / "curve.json", {**head, "pictures": options.pictures, **found})
            draw_curve(found, options.images / "curve.png")
            print(router_table(found), end="\n\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m demo.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("accuracy", "router", "curve")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the gateway (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo/results"), help="folder of results (default: %(default)s)")
    parser.add_argument("--images", type=Path, default=Path("demo/images"), help="folder of figures (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="default: all three")
    parser.add_argument("--n", type=_count, default=500, help="questions of each task and style (default: %(default)s)")
    parser.add_argument("--talk", type=_count, default=100, help="questions without an image (default: %(default)s)")
    parser.add_argument("--pictures", type=_count, default=100, help="of router and curve (default: %(default)s)")
    parser.add_argument("--in-flight", type=_count, default=8, help="requests at once (default: %(default)s)")
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    try:
        asyncio.run(measure(_parser().parse_args(arguments)))
    except KeyboardInterrupt:
        print("\nstopped; every answer so far is kept, and the same command goes on from here", file=sys.stderr)
        return 130
    except Failed as failed:
        print(f"\n{failed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
