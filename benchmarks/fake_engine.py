"""A language worker whose engine says the same at once: `python -m benchmarks.fake_engine SECONDS_A_TOKEN MODEL …`.

vLLM's own HTTP server and its rendering of prompts are real, so what is in front of it can be priced. The engine's process is
there too, and idle.
"""

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import vllm.v1.engine.async_llm as async_llm
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from lm_worker.__main__ import main

WORD, TOKEN = " word", 300
LAG = "BENCHMARK_LAG"
"""Variable that names a file for the event loop's lag: `[time.monotonic(), seconds late]`, a line a sample."""
_SAMPLE = 0.005


async def _sampled(file: Path) -> None:
    while True:
        lines = []
        for _ in range(100):
            due = time.monotonic() + _SAMPLE
            await asyncio.sleep(_SAMPLE)
            lines.append(json.dumps([due, time.monotonic() - due]))
        with file.open("a") as out:
            out.write("".join(f"{line}\n" for line in lines))


def replaced(seconds: float) -> Any:
    """For `AsyncLLM.generate`: as many tokens as may be, so many seconds apart."""

    sampling: list[asyncio.Task[None]] = []

    async def generate(
        self: Any, prompt: Any, sampling_params: SamplingParams, request_id: str, **_rest: Any
    ) -> AsyncIterator[RequestOutput]:
        if LAG in os.environ and not sampling:
            sampling.append(asyncio.create_task(_sampled(Path(os.environ[LAG]))))
        whole = sampling_params.output_kind == RequestOutputKind.FINAL_ONLY
        total = sampling_params.max_tokens or 16
        ids = list(getattr(prompt, "prompt_token_ids", None) or prompt["prompt_token_ids"])
        for done in itertools.count(1):
            if seconds:
                await asyncio.sleep(seconds)
            ended = done == total
            if ended or not whole:
                count = total if whole else 1
                said = CompletionOutput(0, WORD * count, [TOKEN] * count, None, None, finish_reason="length" if ended else None)
                yield RequestOutput(request_id, None, ids, None, [said], ended)
            if ended:
                return

    return generate


if __name__ == "__main__":
    async_llm.AsyncLLM.generate = replaced(float(sys.argv[1]))  # type: ignore[method-assign,unused-ignore]
    main(sys.argv[2:])
