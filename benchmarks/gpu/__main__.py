"""Everything that only a GPU can show, as one bounded command: `python -m benchmarks.gpu`.

It needs torch, safetensors, numpy, numba and Pillow and no network. It saves each measurement at once to FOLDER/gpu.json; a
second run continues. `--dry` runs every measurement with small shapes on the CPU, to show that they work.
"""

import argparse
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.gpu import copies, heads, kernels, preprocessing, serving, shapes, table, towers, worker
from benchmarks.gpu.kit import Kit, Measurement
from common.arguments import create_results_folder, positive_number

_BATCHES = {"300M": (1, 8, 32, 128), "6B": (1, 8, 32, 64)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write `gpu.json` and `gpu.md`.

    Returns the exit status: 1 without a GPU, unless the run is dry; 2 for an option that cannot be used.
    """
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if not parsed.dry and not torch.cuda.is_available():
        print("torch finds no GPU; --dry shows on a CPU that the measurements work")
        return 1
    create_results_folder(parser, "--out", parsed.out)
    device = torch.device("cpu" if parsed.dry else "cuda")
    kit = Kit(parsed.out, parsed.seconds, device, parsed.dry)
    kit.run(each for each in _measurements(kit) if parsed.only in each.name)
    kit.save()
    if not any(parsed.only in name for name in (*kit.figures, *kit.skipped)):
        print(f"--only {parsed.only!r}: no measurement has this text in its name; a run with --dry shows all names")
        return 2
    print(table.write(kit, shapes.PUBLISHED).read_text(encoding="utf-8"), end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="small shapes on the CPU; the figures mean nothing")
    parser.add_argument("--seconds", type=positive_number, default=480.0, help="what does not fit into this time is skipped")
    parser.add_argument("--only", default="", metavar="TEXT", help="leave out measurements without this text in their name")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the results")
    return parser


def _measurements(kit: Kit) -> Iterator[Measurement]:
    """Yield all measurements, what matters most first."""
    small, large = (shapes.dry(shape) if kit.dry else shape for shape in shapes.PUBLISHED)
    for shape in (small, large):
        yield from towers.measurements(kit, shape, (1, 2) if kit.dry else _BATCHES[shape.name])
        _free_memory()
    yield from heads.measurements(kit, small)
    yield from heads.measurements(kit, large)
    yield from copies.measurements(kit, small)
    yield from preprocessing.measurements(kit)
    for shape in (small, large):
        yield from kernels.measurements(kit, shape)
        _free_memory()
    yield from worker.measurements(kit, small)
    yield from serving.measurements(kit, small)


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    raise SystemExit(main())
