"""What a run of the benchmarks may be told."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    baseline: str | None = None
    """Python of the environment that stock vLLM runs in."""
    quick: bool = False

    def repeats(self, usual: int) -> int:
        return 2 if self.quick else usual
