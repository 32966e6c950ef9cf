"""Which lines of libraries are noise. They are lines of real starts and stops of a language worker."""

import pytest

from dvd.library_noise import is_noise

NOISE = """\
Triton is installed, but doesn't include CPU backend. Disabling Triton.
2026-11-26 04:30:46,000 WARNING vllm.platforms.cpu: Triton is not installed. triton-cpu is expected on x86 CPUs.
2026-11-26 04:30:46,000 WARNING vllm.config.vllm: Model Runner V2 requires Triton; using the V1 model runner instead.
/lib/python3.11/site-packages/vllm/triton_utils/dispatcher.py:138: FutureWarning: `torch.distributed.reduce_op` is deprecated
  if hasattr(value, "__dict__"):
  wrapper = lookup(vars(value).get("kernel"))
[W1126 04:31:01.083385363 utils.cpp:68] Warning: NUMA binding: Using MEMBIND policy for memory allocation on the NUMA nodes (0).
(Worker pid=4628) WARNING 11-26 04:31:01 [cpu_worker.py:114] libtcmalloc is not found in LD_PRELOAD. For best performance
{"message": "libiomp is not found in LD_PRELOAD. For best performance, please follow the section `set LD_PRELOAD`"}
(Worker pid=4628) WARNING 11-26 04:31:01 [cpu_worker.py:140] CPU backend doesn't allow to use `torch.set_num_threads` after
WARNING Failed to create oneDNN linear, fallback to torch linear. Exception: could not create a primitive descriptor
WARNING vllm.model_executor.models.utils: Attempted to load weight lm_head.weight with dtype torch.float32 into parameter

WARNING [shutdown] Process manager: force killing remaining processes count=1
WARNING [shutdown] force killing sub process VLLM::Worker pid 4628
nanobind: leaked 4 instances!
 - leaked instance 0x7f516dbb0688 of type "triton._C.libtriton.ir.attribute"
nanobind: leaked 64 types!
 - leaked type "triton._C.libtriton.ir.location"
 - ... skipped remainder
nanobind: leaked 514 functions!
 - leaked function "create_async_tma_gather"
nanobind: this is likely caused by a reference counting issue in the binding code.
See https://nanobind.readthedocs.io/en/latest/refleaks.html"""

MEANT_FOR_OPERATORS = """\
dvd language: vLLM could not start: No available memory for the cache blocks.
2026-11-26 04:30:46,000 WARNING vllm.config.vllm: Enforce eager set, disabling torch.compile and CUDAGraphs.
Found ulimit of 20000 and failed to automatically increase with error current limit exceeds maximum limit.
2026-11-26 04:31:07,515 INFO dvd.sink: sink ready on unix:/tmp/dvd/language-0, 5.9 GiB
Traceback (most recent call last):
  if hasattr(value, "key"):
torch.OutOfMemoryError: CUDA out of memory.
terminate called after throwing an instance of 'std::bad_alloc'"""


@pytest.mark.parametrize("line", NOISE.splitlines())
def test_noise(line: str) -> None:
    assert is_noise(line)


@pytest.mark.parametrize("line", MEANT_FOR_OPERATORS.splitlines())
def test_what_an_operator_needs_is_no_noise(line: str) -> None:
    assert not is_noise(line)
