"""What narrow embeddings do to answers: the same questions about the same embeddings, exact and through each narrow dtype.

One language worker computes all answers in one dtype. Each image is encoded once. Its embedding is delivered as it is, and
once for each narrow dtype: quantised by the vision worker's code and widened by the language worker's, which is what vLLM
reads with `--embedding-dtype`. So answers differ by the narrow dtype alone.
"""

import asyncio
import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import aiohttp
import torch
from torch import Tensor

from common import rpc
from common.checkpoint import open_checkpoint
from common.embedding import Header
from common.messages import dtype_from_proto
from common.tiling import Tiling
from demo.evaluation.plan import QuestionGroup, image_data_urls
from lm_worker.dequantization import CODE_DTYPES, dequantize
from protos import embeddings_pb2, embeddings_pb2_grpc, vision_pb2
from tests.e2e.serving import SYSTEM
from tests.vision_worker import golden
from tests.vision_worker.images import pixels
from vision_worker.delivery import SinkChannels
from vision_worker.encoder import Encoder, FeatureGroup
from vision_worker.models import vir
from vision_worker.quantization import convert, quantize

VARIANTS = ("auto", *CODE_DTYPES)
GOLDEN_VOCABULARY, TOP = 373, 20
"""Log probabilities of each position: of all tokens of a golden checkpoint, and the largest ones of the bundled one."""
_MAX_ANSWER_TOKENS = 64
_BATCH_TILES = 4
_TIMEOUT_SECONDS = 600

Part = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its tokens, its text, and the log probabilities of each position by token."""

    tokens: list[int]
    text: str
    distributions: list[dict[str, float]]


class LanguageWorker:
    """A client of a language worker of `benchmarks/processes.py`: it delivers embeddings and asks vLLM, without a gateway."""

    def __init__(self, folder: Path, model: Path) -> None:
        self._sink, self._http = f"unix:{folder / 'language'}", folder / "language-http"
        self._fingerprint = open_checkpoint(model).fingerprint
        self._sinks = SinkChannels()

    async def __aenter__(self) -> Self:
        async with rpc.open_channel(self._sink) as channel:
            stub = embeddings_pb2_grpc.EmbeddingSinkStub(channel)
            description = await stub.Describe(embeddings_pb2.DescribeRequest(), wait_for_ready=True, timeout=_TIMEOUT_SECONDS)
        self.dtype: torch.dtype = getattr(torch, dtype_from_proto(description.model_dtype))
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
        self._session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self._http)), timeout=timeout)
        await self._sinks.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        await self._sinks.__aexit__()

    async def deliver(self, name: str, tokens: Tensor) -> dict[str, Part]:
        """Deliver an image's visual tokens `[rows, width]` in each variant. Returns its content part for each of them."""
        parts = {}
        for variant in VARIANTS:
            values = tokens if variant == "auto" else dequantize(*quantize(tokens, CODE_DTYPES[variant]), self.dtype)
            (values,) = convert(values, self.dtype)
            key = hashlib.sha256(f"{variant} {name}".encode()).hexdigest()
            header = Header(key, self._fingerprint, str(self.dtype).removeprefix("torch."), *values.shape)
            data = values.contiguous().view(torch.uint8).numpy().data.cast("B")
            await self._sinks.deliver(self._sink, header, data, _TIMEOUT_SECONDS)
            # as the gateway replaces an image
            parts[variant] = {"type": "image_embeds", "image_embeds": {"image_num_tokens": [len(tokens)]}, "uuid": key}
        return parts

    async def ask(self, messages: list[Part], top: int, **options: Any) -> Answer:
        """Return the greedy answer, with the largest log probabilities of each position. Raises `RuntimeError`."""
        body = {
            "messages": messages, "temperature": 0, "logprobs": True, "top_logprobs": top, "return_tokens_as_token_ids": True,
            "return_token_ids": True, **options,
        }  # fmt: skip
        async with self._session.post("http://language/v1/chat/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"vLLM answered {response.status}: {(await response.text())[:500]}")
            choice = json.loads(await response.read())["choices"][0]
        distributions = [
            {candidate["token"]: candidate["logprob"] for candidate in position["top_logprobs"]}
            for position in choice["logprobs"]["content"]
        ]
        return Answer(choice["token_ids"], choice["message"]["content"] or "", distributions)


def divergences(exact: Answer, other: Answer) -> list[float]:
    """KL divergence of each next-token distribution, in nats, as long as both answers have the same tokens before it.

    Tokens that are not listed on both sides count as one, so that with the largest log probabilities only it is a lower bound.
    """
    result = []
    for i, (p, q) in enumerate(zip(exact.distributions, other.distributions, strict=False)):
        if exact.tokens[:i] != other.tokens[:i]:
            break
        result.append(_divergence(p, q))
    return result


def _divergence(p: Mapping[str, float], q: Mapping[str, float]) -> float:
    listed = p.keys() & q.keys()
    total = sum(math.exp(p[token]) * (p[token] - q[token]) for token in listed)
    rest_p, rest_q = (max(0.0, 1 - sum(math.exp(d[token]) for token in listed)) for d in (p, q))
    if rest_p > 1e-7 and rest_q > 1e-7:  # less is rounding
        total += rest_p * math.log(rest_p / rest_q)
    return max(0.0, total)


async def ask_golden(folder: Path, name: str) -> list[Part]:
    """Ask all questions with images of a golden checkpoint. Returns for each case what each variant answers."""
    async with LanguageWorker(folder, golden.FOLDER / name / "checkpoint") as worker:
        return [await _ask_case(worker, case) for case in golden.cases(name)]


async def _ask_case(worker: LanguageWorker, case: golden.Case) -> Part:
    embeddings = golden.split_by_image(case, golden.embed(case, torch.float32))
    images = [await worker.deliver(f"{case.id} {i}", tokens) for i, tokens in enumerate(embeddings)]
    answers = {
        variant: await worker.ask(
            _golden_messages(case, [parts[variant] for parts in images]), GOLDEN_VOCABULARY, max_tokens=16, ignore_eos=True
        )
        for variant in VARIANTS
    }
    return {
        "case": case.id, "official": answers["auto"].tokens == case.fields["greedy_token_ids"],
        **{
            variant: {
                "equal": answers[variant].tokens == answers["auto"].tokens,
                "equal tokens": _equal_tokens(answers["auto"].tokens, answers[variant].tokens),
                "KL": divergences(answers["auto"], answers[variant]),
            }
            for variant in CODE_DTYPES
        },
    }  # fmt: skip


def _equal_tokens(expected: Sequence[int], actual: Sequence[int]) -> int:
    """Number of tokens before the first that differs."""
    pairs = zip(expected, actual, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(actual)))


def _golden_messages(case: golden.Case, images: Sequence[Part]) -> list[Part]:
    """A conversation as the official code builds it: the system message, and images before the question."""
    template = json.loads((golden.FOLDER / case.checkpoint / "checkpoint/config.json").read_text())["template"]
    parts: list[Part] = []
    for number, image in enumerate(images, 1):
        parts += [{"type": "text", "text": f"Image-{number}: "}] if len(images) > 1 else []
        parts.append(image)
    parts.append({"type": "text", "text": case.fields["question"]})
    return [{"role": "system", "content": SYSTEM[template]}, {"role": "user", "content": parts}]


class DemoQuestions:
    """Asks the questions of `make evaluate` about images that are encoded in this process.

    Args:
        worker: The language worker.
        encoder: The bundled checkpoint's tower.
    """

    def __init__(self, worker: LanguageWorker, encoder: Encoder) -> None:
        self._worker, self._encoder = worker, encoder

    def encode(self, group: QuestionGroup) -> list[Tensor]:
        """Return the visual tokens of each image, in bfloat16 like those of the tower that the checkpoint names."""
        description = self._encoder.checkpoint.description
        tiling = Tiling(description.min_tiles, description.max_tiles, description.thumbnail, description.tower.image_size)
        policy = vir.select_policy(cast(Any, vision_pb2.Router.AUTO), description.thresholds)
        results = []
        for url in image_data_urls(group):
            tiles = self._encoder.prepare(pixels(base64.b64decode(url.partition(",")[2])), tiling).pixels
            batches = [tiles[start : start + _BATCH_TILES] for start in range(0, len(tiles), _BATCH_TILES)]
            features = torch.cat([self._encoder.forward(self._encoder.stage(list(batch))) for batch in batches])
            embedding = self._encoder.project([FeatureGroup(features, range(len(features)), policy)])[0]
            results.append(torch.cat(embedding.blocks).to(torch.bfloat16))
        return results

    async def answer(self, groups: Sequence[QuestionGroup]) -> list[Part]:
        """Ask all questions of some groups; the next group is encoded while vLLM answers."""
        records = []
        encoding = asyncio.create_task(asyncio.to_thread(self.encode, groups[0]))
        for group, following in zip(groups, [*groups[1:], None], strict=True):
            embeddings = await encoding
            if following is not None:
                encoding = asyncio.create_task(asyncio.to_thread(self.encode, following))
            records += await self._ask(group, embeddings)
        return records

    async def _ask(self, group: QuestionGroup, embeddings: Sequence[Tensor]) -> list[Part]:
        """Ask all questions of a group in each variant. Returns what is known of each question."""
        images = [
            await self._worker.deliver(f"{group.stream} {group.index} {i}", tokens) for i, tokens in enumerate(embeddings)
        ]
        by_variant = await asyncio.gather(*(
            self._ask_variant(group, [parts[variant] for parts in images]) for variant in VARIANTS
        ))  # fmt: skip
        records = []
        for question, *answers in zip(group.questions, *by_variant, strict=True):
            answer = dict(zip(VARIANTS, answers, strict=True))
            records.append({
                "stream": group.stream, "task": question.task, "expected": question.answer,
                "answers": {variant: answer[variant].text for variant in VARIANTS},
                "KL": {variant: divergences(answer["auto"], answer[variant]) for variant in CODE_DTYPES},
            })  # fmt: skip
        return records

    async def _ask_variant(self, group: QuestionGroup, images: Sequence[Part]) -> list[Answer]:
        """One question after another, so that vLLM reuses the prefix with the images."""
        answers = []
        for question in group.questions:
            content = [*images, {"type": "text", "text": question.text}]
            messages = [{"role": "user", "content": content}]
            answers.append(await self._worker.ask(messages, TOP, max_tokens=_MAX_ANSWER_TOKENS))
        return answers
