"""What one request came to: filled in on its way, counted once when it ends, rendered into its head and the access log."""

import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from protos import vision_pb2 as pb

_OF_THE_VISION_WORKER = ("wait", "decode", "tile", "queue", "encode", "route", "deliver")


@dataclass
class Account:
    """One request. Seconds, by stage; the two dictionaries are in the order in which things happened.

    `stages` are the gateway's own, `vision` those of the vision worker: of the slowest image where there are several, since
    they run side by side. `images` is what `X-DvD-Images` says. `error` is the code of what it ended in.
    """

    identity: str
    arrived: float = field(default_factory=time.monotonic)
    stages: dict[str, float] = field(default_factory=dict)
    vision: dict[str, float] = field(default_factory=dict)
    to_engine: float | None = None
    images: dict[str, int] = field(default_factory=dict)
    error: str | None = None

    def add(self, stage: str, seconds: float) -> None:
        """A stage may come twice, where a request is tried again."""
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    def encoded(self, timings: pb.Timings) -> None:
        """What the vision worker took for an image of this request."""
        for stage in _OF_THE_VISION_WORKER:
            self.vision[stage] = max(self.vision.get(stage, 0.0), getattr(timings, stage))

    def handed_over(self) -> None:
        """The engine has the request now."""
        if self.to_engine is None:
            self.to_engine = self.elapsed()

    def elapsed(self) -> float:
        return time.monotonic() - self.arrived

    @property
    def cache(self) -> str | None:
        """Whether the language worker had the embeddings: `hit`, `part` of them, `miss`; None where there are no images."""
        images, reused = self.images.get("images", 0), self.images.get("reused", 0)
        if not images:
            return None
        return "hit" if reused == images else "part" if reused else "miss"

    def server_timing(self) -> str:
        """W3C's header: what is known now, in milliseconds. `wait` to `deliver` are inside of `vision`."""
        return ", ".join(f"{stage};dur={1e3 * seconds:.1f}" for stage, seconds in self._so_far().items())

    def _so_far(self) -> Mapping[str, float]:
        return self.stages | self.vision | {"total": self.elapsed()}


@dataclass(frozen=True)
class Caller:
    """Who asks (a digest), for which path, the request's account, when its time is up (monotonic), and what is held until
    the answer's last byte."""

    digest: bytes
    path: str
    account: Account
    deadline: float
    held: AsyncExitStack
