"""Lines that vLLM and the libraries below it print at each start or stop, whatever the operator does.

They bypass logging: some are printed by C++, some before logging is configured, some while the interpreter ends. Only the
process that reads a worker's output can drop them. At `--log-level debug` nothing is dropped.
"""

import re

_NOISE = re.compile(
    "|".join(
        (
            # vLLM's CPU build: its kernels are not Triton's, and the model runner that needs Triton is replaced
            r"Triton is installed, but doesn't include CPU backend",
            r"Triton is not installed\. triton-cpu is expected",
            r"Model Runner V2 requires Triton; using the V1 model runner",
            # threads and memory are bound on purpose; preloading other allocators is a matter of tuning
            r"NUMA binding: Using \w+ policy for memory allocation",
            r"lib(tcmalloc|iomp) is not found in LD_PRELOAD",
            r"CPU backend doesn't allow to use `torch\.set_num_threads`",
            r"Failed to create oneDNN linear, fallback to torch linear",
            # weights are converted to the dtype that the operator or the checkpoint has chosen; a line for each tensor
            r"Attempted to load weight \S+ with dtype",
            # vLLM's engine has no orderly end: each stop kills it
            r"\[shutdown\] (Process manager: )?force killing",
            # triton's extension module, while the interpreter ends
            r"nanobind: (leaked \d+ (instances|types|functions|keep_alive records)!|this is likely caused by)",
            r"^ - (leaked (instance|type|function) |\.\.\. skipped remainder)",
            r"See https://nanobind\.readthedocs\.io/",
            # Python's warnings of libraries, which are for their developers, with the line of code below
            r"\.py:\d+: (Future|Deprecation|PendingDeprecation|Runtime|User|Resource|Syntax)Warning: ",
            r"^  (if hasattr\(value, \"__dict__\"\):|wrapper = lookup\(vars\(value\)\.get\(\"kernel\"\)\))$",
        )
    )
)


def is_noise(line: str) -> bool:
    """Return whether an operator can neither act on a worker's line nor learn from it."""
    return not line or bool(_NOISE.search(line))
