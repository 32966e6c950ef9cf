"""What narrow embeddings (`--embedding-dtype int8` or `fp8`) save, what they cost, and what they do to answers.

Bytes are those that real processes report. Answers are compared on the golden checkpoints, with all log probabilities, and on
the bundled checkpoint, with the questions of `make evaluate` about images. Every measurement is stored: a run that was
interrupted continues.
"""

import asyncio
import functools
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import narrow_answers, narrow_costs, processes
from benchmarks.checkpointed import CheckpointedRun
from benchmarks.narrow_answers import GOLDEN_VOCABULARY, TOP, VARIANTS, DemoQuestions, LanguageWorker
from benchmarks.options import Options
from benchmarks.result import Result
from common.checkpoint import open_checkpoint
from demo.evaluation.plan import NEAR_PAIR_TASK, QuestionGroup, plan_accuracy
from lm_worker.dequantization import CODE_DTYPES
from tests.vision_worker import golden
from vision_worker.encoder import Placement
from vision_worker.models import internvl

DEMO = Path(__file__).parents[1] / "demo/checkpoint"
QUESTIONS_PER_TASK, GROUPS = 60, 240
"""Questions of each task and style that are planned; and how many of their groups, each about one image or pair, are sent.

650 answers of which none becomes wrong exclude, with 95 % confidence, a loss above half a point.
"""
MAX_POINTS_LOST = 0.5
_GROUPS_PER_PART = 8
_PLACES = ("delivered", "redis", "sink")


def run(options: Options) -> Result:
    """Measure everything. The headline is the smallest ratio of bfloat16's bytes over a narrow dtype's; the target is 1.95."""
    parts = CheckpointedRun("narrow", options.quick)
    sizes = parts.measure("bytes", narrow_costs.measure_bytes)
    figures: dict[str, Any] = {
        "bytes per tile of 256 x 4096": sizes,
        "cost per tile": parts.measure("costs", lambda: narrow_costs.measure_costs(10 if options.quick else 50)),
        "golden cases": _golden(parts),
        "bundled checkpoint": _demo(parts, 4 if options.quick else QUESTIONS_PER_TASK),
    }
    ratios = [sizes["bfloat16"][place] / sizes[dtype][place] for dtype in CODE_DTYPES for place in _PLACES]
    figures["bytes over bfloat16's"] = {
        dtype: {place: round(sizes[dtype][place] / sizes["bfloat16"][place], 4) for place in _PLACES} for dtype in CODE_DTYPES
    }
    lost = max(figures["bundled checkpoint"]["points lost"].values())
    parts.finish()
    verdict = "met" if lost <= MAX_POINTS_LOST else "missed"
    return Result("narrow", min(ratios), 1.95, 0.0, figures, [
        f"points of accuracy lost by the worse dtype: {lost:.2f} of at most {MAX_POINTS_LOST}: {verdict}",
        "a divergence is the mean over positions before which both answers are equal; "
        f"of the golden checkpoints over all tokens, of the bundled one over the {TOP} likeliest and the rest as one",
    ])  # fmt: skip


@contextmanager
def _language_worker(model: Path, max_logprobs: int, dtype: str) -> Iterator[Path]:
    """The folder of a language worker with one core."""
    with tempfile.TemporaryDirectory(prefix="dvd-bench-") as name:
        folder, flags = Path(name), (f"--dtype={dtype}", f"--max-logprobs={max_logprobs}")
        with processes.language_worker(folder, model, processes.available_cores()[-1:], *flags):
            yield folder


def _golden(parts: CheckpointedRun) -> dict[str, Any]:
    """How often greedy tokens stay the same, and the mean divergence. The weights are random: margins are small."""

    def ask(name: str) -> list[Any]:
        with _language_worker(golden.FOLDER / name / "checkpoint", GOLDEN_VOCABULARY, "float32") as folder:
            return asyncio.run(narrow_answers.ask_golden(folder, name))

    by_checkpoint = {name: parts.measure(f"golden {name}", lambda name=name: ask(name)) for name in golden.NAMES}  # type: ignore[misc]
    cases = [case for cases in by_checkpoint.values() for case in cases]
    return {
        "cases": len(cases),
        "auto equals the official tokens": _share(case["official"] for case in cases),
        **{
            dtype: {
                "all 16 tokens unchanged": _share(case[dtype]["equal"] for case in cases),
                "first token unchanged": _share(case[dtype]["equal tokens"] > 0 for case in cases),
                **_divergence_figures(value for case in cases for value in case[dtype]["KL"]),
            }
            for dtype in CODE_DTYPES
        },
    }


def _demo(parts: CheckpointedRun, questions_per_task: int) -> dict[str, Any]:
    groups = [group for group in plan_accuracy(questions_per_task, 1) if group.scenes]
    groups.sort(key=lambda group: group.index)  # all streams in turn, so that the first groups are balanced
    groups = groups[:GROUPS]
    records = [record for answers in _ask_groups(parts, groups) for record in answers]
    tasks = list(dict.fromkeys(record["task"] for record in records))
    usual = [record for record in records if record["task"] != NEAR_PAIR_TASK]  # as in the table of `make evaluate`
    accuracies = {variant: _accuracy(usual, variant) for variant in VARIANTS}
    return {
        "groups": len(groups),
        "questions": len(records),
        "accuracy, %": {
            variant: {
                "all": accuracies[variant],
                **{task: _accuracy([r for r in records if r["task"] == task], variant) for task in tasks},
            }
            for variant in VARIANTS
        },
        "points lost": {dtype: round(accuracies["auto"] - accuracies[dtype], 2) for dtype in CODE_DTYPES},
        **{
            dtype: {
                "answers unchanged": _share(r["answers"][dtype] == r["answers"]["auto"] for r in records),
                "became wrong": sum(_is_correct(r, "auto") and not _is_correct(r, dtype) for r in records),
                "became right": sum(_is_correct(r, dtype) and not _is_correct(r, "auto") for r in records),
                **_divergence_figures(value for r in records for value in r["KL"][dtype]),
            }
            for dtype in CODE_DTYPES
        },
    }


def _ask_groups(parts: CheckpointedRun, groups: Sequence[QuestionGroup]) -> list[list[Any]]:
    """Ask all groups; every few of them are stored. Servers are started when the first one is not."""
    blocks = [groups[start : start + _GROUPS_PER_PART] for start in range(0, len(groups), _GROUPS_PER_PART)]
    torch.set_num_threads(1)  # vLLM computes on the other core
    with ExitStack() as stack, asyncio.Runner() as runner:

        @functools.cache
        def questions() -> DemoQuestions:
            worker = LanguageWorker(stack.enter_context(_language_worker(DEMO, TOP, "bfloat16")), DEMO)
            stack.callback(lambda: runner.run(worker.__aexit__()))
            return DemoQuestions(runner.run(worker.__aenter__()), _demo_encoder())

        def ask(block: Sequence[QuestionGroup]) -> list[Any]:
            return runner.run(questions().answer(block))

        results = [parts.measure(f"demo {i}", functools.partial(ask, block)) for i, block in enumerate(blocks)]
        stack.close()  # while the runner can still run what it closes
        return results


def _demo_encoder() -> internvl.InternVL:
    """The bundled tower, which computes in float32: without units for bfloat16 a CPU is several times slower in that."""
    return internvl.load(open_checkpoint(DEMO), Placement(torch.device("cpu"), torch.float32))


def _accuracy(records: Sequence[Any], variant: str) -> float:
    return round(100 * statistics.mean(_is_correct(record, variant) for record in records), 2)


def _is_correct(record: Any, variant: str) -> bool:
    return bool(record["answers"][variant].strip() == record["expected"])


def _share(values: Iterable[bool]) -> str:
    """Such as "40 of 42"."""
    listed = list(values)
    return f"{sum(listed)} of {len(listed)}"


def _divergence_figures(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "mean KL, nats": round(statistics.mean(ordered), 6),
        "99th percentile of KL": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 6),
        "positions": len(ordered),
    }
