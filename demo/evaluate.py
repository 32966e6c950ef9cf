"""Evaluate a served model on images it was never trained on: `python -m demo.evaluate --url http://127.0.0.1:8000`.

All answers are greedy and come from the gateway over HTTP. There are four parts:

1. accuracy  every task, with the fonts and textures of training and with held-out ones; questions without an image
2. router    images of several tiles, with the router off, with its default thresholds, and with every tile compressed
3. curve     the same images with varying thresholds of the router
4. tiles     the same images cut into fewer tiles, as degradation under load does

Every answer is appended to answers.jsonl. After ctrl-C, the same command resumes. The file identifies a model by its name:
delete it when other weights are served under the same name.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from common.arguments import create_results_folder, positive_integer
from demo.evaluation.answers import AnswerFile, AnswerRecord
from demo.evaluation.client import Client, EvaluationError, ask_all
from demo.evaluation.plan import (
    ROUTER_MODES,
    SEED,
    THRESHOLDS,
    TILE_BUDGETS,
    ImageSetting,
    QuestionGroup,
    plan_accuracy,
    plan_router,
)
from demo.evaluation.plots import plot_accuracy, plot_token_curve
from demo.evaluation.scores import accuracy_scores, accuracy_table, router_table, setting_scores
from demo.files import write_json

_PARTS = ("accuracy", "router", "curve", "tiles")
_REQUEST_TIMEOUT_SECONDS = 900


async def evaluate(options: argparse.Namespace) -> None:
    """Run the chosen parts, and write results, plots and tables.

    Raises:
        EvaluationError: A request failed.
    """
    async with AsyncExitStack() as stack:
        timeout = aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_SECONDS)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        client = Client(session, options.url)
        head = {"date": datetime.now(UTC).date().isoformat(), "server": await client.describe(), "seed": SEED}
        answers = stack.enter_context(AnswerFile(options.out / "answers.jsonl", client.model))

        async def ask(part: str, groups: list[QuestionGroup]) -> list[AnswerRecord]:
            if stored := len(answers.records_of(groups)):
                print(f"{part}: resuming after {stored} stored answers", file=sys.stderr)
            await ask_all(client, part, groups, answers, options.in_flight)
            return answers.records_of(groups)

        if "accuracy" in options.parts:
            records = await ask("accuracy", list(plan_accuracy(options.n, options.talk)))
            _report_accuracy(options, head, records)
        if "router" in options.parts or "curve" in options.parts:  # the curve shows the three modes too
            records = await ask("router", list(plan_router(options.pictures, ROUTER_MODES)))
            _report_settings(options, head, records, "router", ROUTER_MODES)
        if "curve" in options.parts:
            records += await ask("curve", list(plan_router(options.pictures, THRESHOLDS)))
            _report_settings(options, head, records, "curve", (*ROUTER_MODES, *THRESHOLDS))
        if "tiles" in options.parts:
            records = await ask("tiles", list(plan_router(options.pictures, TILE_BUDGETS)))
            _report_settings(options, head, records, "tiles", TILE_BUDGETS)


def _report_accuracy(options: argparse.Namespace, head: dict[str, Any], records: list[AnswerRecord]) -> None:
    scores = accuracy_scores(records)
    write_json(options.out / "accuracy.json", {**head, "questions_per_task": options.n, **scores})
    plot_accuracy(scores, options.images / "accuracy.png")
    print(accuracy_table(scores), end="\n\n")


def _report_settings(
    options: argparse.Namespace,
    head: dict[str, Any],
    records: list[AnswerRecord],
    part: str,
    settings: Sequence[ImageSetting],
) -> None:
    scores = setting_scores(records, settings)
    write_json(options.out / f"{part}.json", {**head, "images": options.pictures, **scores})
    if part == "curve":
        plot_token_curve(scores, options.images / "curve.png")
    print(router_table(scores), end="\n\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m demo.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="URL of the gateway (default: %(default)s)")
    add("--out", type=Path, default=Path("demo/results"), help="folder of the results (default: %(default)s)")
    add("--images", type=Path, default=Path("demo/images"), help="folder of the plots (default: %(default)s)")
    add("--parts", nargs="+", choices=_PARTS, default=_PARTS, help="parts to run (default: all)")
    add("--n", type=positive_integer, default=500, help="questions per task and style (default: %(default)s)")
    add("--talk", type=positive_integer, default=100, help="questions without an image (default: %(default)s)")
    add("--pictures", type=positive_integer, default=100, help="images of router and curve (default: %(default)s)")
    add("--in-flight", type=positive_integer, default=8, help="concurrent requests (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for option in ("out", "images"):
        create_results_folder(parser, f"--{option}", getattr(options, option))
    try:
        asyncio.run(evaluate(options))
    except KeyboardInterrupt:
        print("\nInterrupted. All answers so far are stored; run the same command to resume.", file=sys.stderr)
        return 130
    except EvaluationError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
