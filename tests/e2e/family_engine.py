"""A program: vLLM's engine with our model class and connector, one checkpoint after the other in one process.

`python -m tests.e2e.family_engine JOBS.json`; prints one JSON line a job. Its imports cost more than all its work, which is
why it takes all checkpoints; a start of the whole server for each would take the suite a minute a piece.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy token ids for each conversation of a job: `checkpoint`, `store` (the connector's folder), `conversations`."""
    from vllm import LLM, SamplingParams
    from vllm.config import ECTransferConfig

    engine = LLM(
        job["checkpoint"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        kv_cache_memory_bytes=128 << 20,
        enable_mm_embeds=True,
        limit_mm_per_prompt={"image": 0},
        interleave_mm_strings=True,
        ec_transfer_config=ECTransferConfig(
            ec_connector="SharedMemoryConnector",
            ec_connector_module_path="lm_worker.connector",
            ec_role="ec_consumer",
            ec_connector_extra_config={"folder": job["store"], "wait": 10},
        ),
    )
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    said = engine.chat(job["conversations"], sampling, use_tqdm=False)
    engine.llm_engine.engine_core.shutdown()
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in said],
        "prompts": [len(output.prompt_token_ids or ()) for output in said],
    }


def main() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            result = answer(job)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        cleanup_dist_env_and_memory()
        print("RESULT " + json.dumps({"name": job["name"], **result}), flush=True)


if __name__ == "__main__":
    os.environ |= {"DVD_LANGUAGE_WORKER": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_MEDIA_CONNECTOR": "dvd-refuse"}
    main()
