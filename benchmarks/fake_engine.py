"""A language worker with a fake engine: `python -m benchmarks.fake_engine SECONDS_PER_TOKEN MODEL …`.

The engine emits the same token at a fixed pace. vLLM's HTTP server and its prompt rendering are real, so the cost of what
stands in front of it can be measured. The real engine's process runs too, idle.
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

LAG_FILE_VARIABLE = "BENCHMARK_LAG"
"""Environment variable: file for the event loop's lag, lines of `[time.monotonic(), seconds late]`."""
_WORD, _TOKEN_ID = " word", 300
_SAMPLE_INTERVAL_SECONDS = 0.005
_SAMPLES_PER_WRITE = 100


async def _sample_lag(file: Path) -> None:
    """Append the lag of the running event loop to `file` until cancelled."""
    while True:
        lines = []
        for _ in range(_SAMPLES_PER_WRITE):
            due = time.monotonic() + _SAMPLE_INTERVAL_SECONDS
            await asyncio.sleep(_SAMPLE_INTERVAL_SECONDS)
            lines.append(json.dumps([due, time.monotonic() - due]))
        with file.open("a") as out:
            out.write("".join(f"{line}\n" for line in lines))


def fixed_pace_generate(seconds_per_token: float) -> Any:
    """A replacement for `AsyncLLM.generate` that emits `max_tokens` tokens, `seconds_per_token` apart."""

    sampling: list[asyncio.Task[None]] = []

    async def generate(
        self: Any, prompt: Any, sampling_params: SamplingParams, request_id: str, **_rest: Any
    ) -> AsyncIterator[RequestOutput]:
        if LAG_FILE_VARIABLE in os.environ and not sampling:
            sampling.append(asyncio.create_task(_sample_lag(Path(os.environ[LAG_FILE_VARIABLE]))))
        final_only = sampling_params.output_kind == RequestOutputKind.FINAL_ONLY
        total = sampling_params.max_tokens or 16
        prompt_ids = list(getattr(prompt, "prompt_token_ids", None) or prompt["prompt_token_ids"])
        for done in itertools.count(1):
            if seconds_per_token:
                await asyncio.sleep(seconds_per_token)
            finished = done == total
            if finished or not final_only:
                count = total if final_only else 1
                reason = "length" if finished else None
                output = CompletionOutput(0, _WORD * count, [_TOKEN_ID] * count, None, None, finish_reason=reason)
                yield RequestOutput(request_id, None, prompt_ids, None, [output], finished)
            if finished:
                return

    return generate


if __name__ == "__main__":
    async_llm.AsyncLLM.generate = fixed_pace_generate(float(sys.argv[1]))  # type: ignore[method-assign,unused-ignore]
    main(sys.argv[2:])
