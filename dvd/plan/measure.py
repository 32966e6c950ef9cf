"""Measures the stage costs of a running server, for `dvd plan --from URL`.

About 40 requests are sent, most of them one at a time, so that a stage waits for nothing: the gateway reports the seconds of
each stage in the response's `Server-Timing`. What cannot be seen from outside keeps its default, with a note in the file.
"""

import base64
import io
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dvd.plan import file
from dvd.plan.model import Costs, Kind, LanguageCosts, Load, VisionCosts
from dvd.plan.probe import Answer, Probe, ProbeError, Samples

_REPETITIONS = 3
_ANSWER_TOKENS = 33
_CONCURRENT = 8
_SHORT_WORDS, _LONG_TOKENS = 16, 2000
_SMALL_IMAGE, _LARGE_IMAGE = (448, 448), (1344, 896)
"""Width and height: one tile, and six with a thumbnail for most checkpoints."""
_MIN_TIMED_SECONDS = 1e-4
"""Resolution of `Server-Timing`."""
_MIN_SERVED_REQUESTS = 50
"""Requests that a server must have served before its own load is taken as typical."""

_NOTES = {
    "vision.cores": "Not measured: the cores of a vision worker's machine",
    "vision.batch_tiles": "Not measured: 32 on a GPU, 1 on a CPU",
    "language.step_tokens": "Not measured",
    "language.sequences": "Not measured",
    "compressed_tokens_per_tile": "A quarter",
    "bytes_per_token": "Not measured: dvd describe MODEL prints the width",
}


@dataclass(frozen=True)
class Measurement:
    """The costs and the load of a server, and what to know about them.

    Attributes:
        costs: costs of the stages.
        load: the load that the server has served before, or the default.
        foreign_requests: requests of others that were served meanwhile, so that the costs are too high.
        is_load_measured: whether `load` is what the server has served.
    """

    costs: Costs
    load: Load
    foreign_requests: int
    is_load_measured: bool

    def as_file(self, url: str) -> str:
        """Return the file for `dvd plan`."""
        header = [f"Costs of {url}, measured by dvd plan --from. Set load.rate and load.limits to what you need."]
        if self.foreign_requests:
            header.append(f"{self.foreign_requests} other requests were served meanwhile: the costs are too high.")
        if not self.is_load_measured:
            header.append("The server has served too few requests to tell their kind: set load.kinds too.")
        return file.render(self.costs, self.load, tuple(header), _NOTES)


def measure(probe: Probe, report: Callable[[str], None]) -> Measurement:
    """Measure a server. `report` gets a line about each part of the work.

    Raises:
        ProbeError: the server does not answer, or a request failed.
    """
    model = probe.model()
    before = probe.metrics()
    report("warming up")
    probe.answer(_prompt(probe), [_image(probe, _LARGE_IMAGE)], tokens=2)
    report("decoding, alone and with 8 at once")
    step, decode = _decode_costs(probe)
    report("prompts of three lengths")
    request, prefill, attention = _prefill_costs(probe, step + decode, model.get("max_model_len") or 2 * _LONG_TOKENS)
    report("images of two sizes")
    small, large = (_encode(probe, size) for size in (_SMALL_IMAGE, _LARGE_IMAGE))
    tokens_per_tile = large.tokens_per_tile
    costs = Costs(
        vision=_vision_costs(small, large),
        language=LanguageCosts(step=step, decode=decode, request=request, prefill=prefill, attention=attention),
        tokens_per_tile=tokens_per_tile,
        compressed_tokens_per_tile=max(1, tokens_per_tile // 4),
        bytes_per_token=_BYTES_PER_TOKEN,
    )
    load = served_load(before, [sample for samples in _engine_metrics(probe, before) for sample in samples])
    foreign = _served_requests(probe.metrics()) - _served_requests(before) - probe.sent_requests
    return Measurement(costs, load or Load(), max(0, foreign), load is not None)


def _prompt(probe: Probe, words: int = _SHORT_WORDS) -> str:
    """Return a text that the engine has not cached: it begins with a new number."""
    return f"{probe.number()} " + "word " * words


def _decode_costs(probe: Probe) -> tuple[float, float]:
    """Return the seconds of a step, and those of a sequence in it."""
    probe.answers([_prompt(probe)] * _CONCURRENT, 2)  # warm-up
    alone = statistics.median(probe.answer(_prompt(probe), tokens=_ANSWER_TOKENS).token_seconds for _ in range(_REPETITIONS))
    texts = [_prompt(probe) for _ in range(_CONCURRENT)]
    shared = statistics.median(answer.token_seconds for answer in probe.answers(texts, _ANSWER_TOKENS))
    return fit_decode(alone, shared, _CONCURRENT)


def fit_decode(alone: float, shared: float, sequences: int) -> tuple[float, float]:
    """Return the costs `step` and `decode`.

    Args:
        alone: seconds between two tokens of a sequence alone.
        shared: the same with `sequences` sequences.
        sequences: how many ran at once.
    """
    decode = min(alone, max(0.0, (shared - alone) / (sequences - 1)))
    return alone - decode, decode


def _prefill_costs(probe: Probe, token_seconds: float, context: int) -> tuple[float, float, float]:
    """Return the costs `request`, `prefill` and `attention` from prompts of three lengths."""
    short = _prefill(probe, _SHORT_WORDS)
    per_word = (_prefill(probe, 5 * _SHORT_WORDS)[0] - short[0]) / (4 * _SHORT_WORDS)
    long_words = max(4 * _SHORT_WORDS, int(min(_LONG_TOKENS, context / 2) / max(1.0, per_word)))
    points = [short, _prefill(probe, long_words // 2), _prefill(probe, long_words)]
    return fit_prefill(points, token_seconds)


def _prefill(probe: Probe, words: int) -> tuple[int, float]:
    """Return the tokens of a prompt and the seconds that the engine takes for it and one token."""
    answers = [probe.answer(_prompt(probe, words)) for _ in range(_REPETITIONS)]
    return answers[0].prompt_tokens, statistics.median(answer.seconds["engine"] for answer in answers)


def fit_prefill(points: list[tuple[int, float]], token_seconds: float) -> tuple[float, float, float]:
    """Return the costs `request`, `prefill` and `attention`.

    Args:
        points: three prompts with increasing numbers of tokens, and the seconds that each took with one token of output.
        token_seconds: seconds of that token, a step of its own excluded.
    """
    (n1, t1), (n2, t2), (n3, t3) = points
    first, second = (t2 - t1) / (n2 - n1), (t3 - t2) / (n3 - n2)
    attention = max(0.0, 2 * (second - first) / (n3 - n1))
    prefill = max(1e-9, (t3 - t1) / (n3 - n1) - attention * (n1 + n3) / 2)
    request = t1 - token_seconds - n1 * (prefill + attention * n1 / 2)
    return max(0.0, request), prefill, attention


@dataclass(frozen=True)
class Encoding:
    """What one image took, in seconds of the vision worker."""

    tiles: int
    tokens_per_tile: int
    prepare: float
    encode: float
    deliver: float


def _encode(probe: Probe, size: tuple[int, int]) -> Encoding:
    """Return the medians of several new images of a size."""
    answers = [probe.answer(_prompt(probe), [_image(probe, size)]) for _ in range(_REPETITIONS)]
    if not all("encode" in answer.seconds for answer in answers):
        raise ProbeError("a new image was not encoded: the server's answer has no entry encode in Server-Timing")

    def median(*stages: str) -> float:
        return statistics.median(sum(answer.seconds[stage] for stage in stages) for answer in answers)

    images = answers[0].images
    return Encoding(
        images["tiles"], _tokens_per_tile(answers[0]), median("decode", "tile"), median("encode", "route"), median("deliver")
    )


def _tokens_per_tile(answer: Answer) -> int:
    """Return the visual tokens of a tile that is not compressed."""
    images = answer.images
    return max(1, round(images["tokens"] / (images["tiles"] - 0.75 * images["compressed"])))


def _vision_costs(small: Encoding, large: Encoding) -> VisionCosts:
    batch, tile = fit_encode(small, large)
    size = large.tiles * large.tokens_per_tile * _BYTES_PER_TOKEN
    return VisionCosts(
        prepare=max(_MIN_TIMED_SECONDS, large.prepare) / large.tiles,
        batch=batch,
        tile=tile,
        network=size / max(_MIN_TIMED_SECONDS, large.deliver),
    )


def fit_encode(small: Encoding, large: Encoding) -> tuple[float, float]:
    """Return the costs `batch` and `tile` from images of two sizes."""
    if large.tiles == small.tiles:
        return 0.0, max(_MIN_TIMED_SECONDS, large.encode) / large.tiles
    tile = (large.encode - small.encode) / (large.tiles - small.tiles)
    tile = min(max(tile, 1e-6), max(_MIN_TIMED_SECONDS, large.encode) / large.tiles)
    return max(0.0, small.encode - tile * small.tiles), tile


_BYTES_PER_TOKEN = 2 * 4096


def _image(probe: Probe, size: tuple[int, int]) -> str:
    """Return a `data:` URL of a new JPEG: coarse noise, which costs about as much to decode as a photograph."""
    try:
        from PIL import Image  # here, not at import: only --from needs it
    except ImportError:
        raise ProbeError("--from needs Pillow to make images: pip install 'dvd-serve[gateway]'") from None
    width, height = size
    columns, rows = width // 16 + 1, height // 16 + 1
    coarse = Image.frombytes("RGB", (columns, rows), random.Random(probe.number()).randbytes(3 * columns * rows))
    content = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _engine_metrics(probe: Probe, gateway: Samples) -> list[Samples]:
    """Return the metrics of every vLLM."""
    workers = sum(name == "dvd_worker_up" and labels["kind"] == "language" for name, labels, _ in gateway)
    return [probe.metrics(f"/metrics/engine/{number}") for number in range(workers)]


def _total(samples: Samples, name: str, **labels: Any) -> float:
    return sum(value for n, found, value in samples if n == name and all(found.get(k) == v for k, v in labels.items()))


_GENERATING_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


def _served_requests(gateway: Samples) -> int:
    return int(sum(_total(gateway, "dvd_requests_total", route=route, code="200") for route in _GENERATING_ROUTES))


def served_load(gateway: Samples, engines: Samples) -> Load | None:
    """Return the mean request that a server has served, as a load; None if it has served too few.

    Args:
        gateway: samples of the gateway's metrics.
        engines: samples of the metrics of all vLLM servers together.
    """
    requests = _served_requests(gateway)
    prompt, output = (_total(engines, f"vllm:{name}_tokens_total") for name in ("prompt", "generation"))
    if requests < _MIN_SERVED_REQUESTS or not prompt:
        return None
    images = _total(gateway, "dvd_images_total")
    tiles, encoded = _total(gateway, "dvd_image_tiles_sum"), _total(gateway, "dvd_image_tiles_count")
    hits, misses = (_total(gateway, "dvd_cache_events_total", tier="sink", event=event) for event in ("hits", "misses"))
    compressed = _total(gateway, "dvd_tiles_total", resolution="compressed")
    text = prompt - _total(gateway, "dvd_visual_tokens_total")
    kind = Kind(
        images=max(1, round(images / requests)),
        tiles=max(1, round(tiles / max(1, encoded))),
        text=max(1, round(text / requests)),
        output=max(1, round(output / requests)),
        repeated=hits / max(1, hits + misses),
    )
    kinds = _without_images(kind, images / requests)
    return Load(kinds=kinds, compressed=compressed / max(1, _total(gateway, "dvd_tiles_total")))


def _without_images(kind: Kind, images: float) -> list[Kind]:
    """Return the kinds of a mix with this mean number of images: below 1, some requests have none."""
    plain = kind.model_copy(update={"weight": round(1 - images, 3), "images": 0, "tiles": 1, "repeated": 0.0})
    if not images:
        return [plain]
    return [kind.model_copy(update={"weight": round(images, 3)}), plain] if images < 0.95 else [kind]
