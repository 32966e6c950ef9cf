"""Scores of the answers, with confidence intervals, and Markdown tables of them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from demo.evaluation.answers import AnswerRecord
from demo.evaluation.plan import NEAR_PAIR_TASK, SINGLE_IMAGE_TASKS, STYLES, ImageSetting
from demo.text.questions import TASKS

Json = dict[str, Any]
_Z_95_PERCENT = 1.959964


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion."""
    if n == 0:
        return 0.0, 1.0
    z = _Z_95_PERCENT
    share, scale = correct / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half_width = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def score(records: Sequence[AnswerRecord]) -> Json:
    """Return number of answers, correct answers, accuracy (None without answers) and its interval."""
    correct, n = sum(record.is_correct for record in records), len(records)
    low, high = wilson_interval(correct, n)
    accuracy = round(correct / n, 4) if n else None
    return {"n": n, "correct": correct, "accuracy": accuracy, "interval": [round(low, 4), round(high, 4)]}


def score_by_task(records: Sequence[AnswerRecord]) -> Json:
    """Return the score of all records, and of each task."""
    tasks = sorted({record.task for record in records}, key=lambda task: TASKS.index(task) if task in TASKS else len(TASKS))
    return {"all": score(records), **{task: score([r for r in records if r.task == task]) for task in tasks}}


def token_usage(records: Sequence[AnswerRecord]) -> Json:
    """Return the visual tokens of the images. An image counts once, however many questions are about it."""
    images = {record.index: record for record in records}.values()
    tokens, uncompressed = sum(r.tokens or 0 for r in images), sum(r.uncompressed_tokens for r in images)
    share = round(tokens / uncompressed, 4) if uncompressed else None
    return {"images": len(images), "tokens": tokens, "uncompressed_tokens": uncompressed, "token_share": share}


def accuracy_scores(records: Sequence[AnswerRecord]) -> Json:
    """Return the scores of the accuracy part: by style and task, of near pairs, and of text."""
    styles = {name: score_by_task([r for r in records if r.stream in (name, f"{name} pairs")]) for name in STYLES}
    near_pairs = {name: score([r for r in records if r.stream == f"{name} near"]) for name in STYLES}
    return {"styles": styles, "near_pairs": near_pairs, "text": score_by_task([r for r in records if r.stream == "text"])}


def setting_scores(records: Sequence[AnswerRecord], settings: Iterable[ImageSetting]) -> Json:
    """Return tokens and scores of each setting."""
    scores = []
    for setting in settings:
        chosen = [record for record in records if record.setting == setting.name]
        made_with = {"setting": setting.name, "vir": setting.vir, "max_tiles": setting.max_tiles}
        scores.append({**made_with, **token_usage(chosen), "tasks": score_by_task(chosen)})
    return {"settings": scores}


def format_score(score: Json | None) -> str:
    """Return, for example, "97.4 (95.6–98.5)"; a dash without answers."""
    if not score or not score["n"]:
        return "–"
    low, high = score["interval"]
    return f"{100 * score['accuracy']:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. All columns but the first are aligned to the right."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracy_table(scores: Json) -> str:
    """Return the table of `accuracy_scores`."""
    styles = scores["styles"]
    rows = [[task, *(format_score(styles[name].get(task)) for name in STYLES)] for task in ("all", *TASKS)]
    rows.append([NEAR_PAIR_TASK, *(format_score(scores["near_pairs"].get(name)) for name in STYLES)])
    rows += [[task, format_score(value), "–"] for task, value in scores["text"].items() if task != "all"]
    return markdown_table(["accuracy in % (95 % interval)", *STYLES], rows)


def router_table(scores: Json) -> str:
    """Return the table of `setting_scores`."""
    tasks = ["all", *SINGLE_IMAGE_TASKS]
    rows = [
        [s["setting"], f"{100 * s['token_share']:.1f}", *(format_score(s["tasks"].get(task)) for task in tasks)]
        for s in scores["settings"]
    ]
    return markdown_table(["setting", "% of visual tokens", *tasks], rows)
