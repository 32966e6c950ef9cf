"""Assignment of GPUs to workers."""

from pathlib import Path

import pytest

from dvd import devices as devices_module
from dvd.devices import assign, visible_gpus

CASES = [
    (1, 1, [], [[]], [[]], False),
    (2, 3, [], [[], []], [[], [], []], False),
    (1, 1, ["0"], [["0"]], [["0"]], True),
    (1, 1, ["0", "1"], [["1"]], [["0"]], False),
    (1, 1, ["0", "1", "2"], [["2"]], [["0", "1"]], False),
    (1, 2, ["0", "1", "2", "3"], [["3"]], [["0"], ["1"]], False),
    (2, 2, ["4", "5", "6", "7"], [["6"], ["7"]], [["4"], ["5"]], False),
    (3, 1, ["0", "1"], [["0"], ["1"], ["0"]], [["0"]], True),
    (1, 1, ["GPU-abc", "GPU-def"], [["GPU-def"]], [["GPU-abc"]], False),
]


@pytest.mark.parametrize(("vision", "language", "gpus", "for_vision", "for_language", "shared"), CASES)
def test_gpus_are_assigned(
    vision: int, language: int, gpus: list[str], for_vision: list[list[str]], for_language: list[list[str]], shared: bool
) -> None:
    devices = assign(vision, language, gpus)
    assert (devices.vision, devices.language, devices.shared) == (for_vision, for_language, shared)


@pytest.mark.parametrize("vision", range(1, 5))
@pytest.mark.parametrize("language", range(1, 5))
@pytest.mark.parametrize("count", range(1, 9))
def test_every_worker_gets_a_gpu_and_none_is_shared_if_there_are_enough(vision: int, language: int, count: int) -> None:
    devices = assign(vision, language, [str(i) for i in range(count)])
    assigned = [*devices.vision, *devices.language]
    assert all(assigned)
    numbers = [gpu for gpus in assigned for gpu in gpus]
    assert devices.shared == (count < vision + language)
    assert devices.shared or len(set(numbers)) == len(numbers)


def test_variables_and_flags_of_workers() -> None:
    shared, alone, none = assign(1, 1, ["0"]), assign(1, 1, ["0", "1", "2"]), assign(1, 1, [])
    assert alone.environment(alone.language[0]) == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert none.environment(none.vision[0]) == {}
    assert shared.vllm_flags() == ["--gpu-memory-utilization=0.7"]
    assert alone.vllm_flags() == none.vllm_flags() == []


@pytest.mark.parametrize(
    ("cores", "count", "shares"),
    [(8, 1, [None]), (2, 2, ["0", "1"]), (8, 2, ["0,1,2,3", "4,5,6,7"]), (5, 2, ["0,1", "2,3,4"]), (2, 3, [None, None, None])],
)
def test_language_workers_without_gpus_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, count: int, shares: list[str | None]
) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    devices = assign(1, count, [])
    environments = [devices.language_environment(number) for number in range(count)]
    assert [environment.get("VLLM_CPU_OMP_THREADS_BIND") for environment in environments] == shares
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    assert [devices.language_environment(number) for number in range(count)] == [{}] * count, "the operator has chosen"


@pytest.mark.parametrize(
    ("variable", "gpus"), [("", []), ("-1", []), ("0", ["0"]), (" 2, 1 ,", ["2", "1"]), ("GPU-a,MIG-b", ["GPU-a", "MIG-b"])]
)
def test_cuda_visible_devices_limits_the_gpus(monkeypatch: pytest.MonkeyPatch, variable: str, gpus: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus() == gpus


def test_without_the_variable_the_device_files_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("nvidia1", "nvidia0", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices_module, "_DEVICE_FOLDER", tmp_path)
    assert visible_gpus() == ["0", "1"]
