"""Options of a benchmark run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Options that every benchmark receives."""

    baseline: str | None = None
    """Python interpreter of the environment that stock vLLM runs in."""
    quick: bool = False
    """Whether to repeat each measurement only twice."""

    def repeats(self, default: int) -> int:
        """Number of repeats of a measurement: `default`, or 2 in a quick run."""
        return 2 if self.quick else default

    def require_baseline(self, purpose: str) -> str:
        """The baseline interpreter. Raises `RuntimeError`, naming the `purpose`, if none is configured."""
        if self.baseline is None:
            raise RuntimeError(f"{purpose}: pass the Python of an environment that has it with --baseline (make baseline)")
        return self.baseline
