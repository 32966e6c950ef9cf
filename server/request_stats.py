"""Statistics of one request: collected while it is served, rendered into its headers, recorded when it ends."""

import time
from dataclasses import dataclass, field

from protos import vision_pb2 as pb

_VISION_STAGES = ("wait", "decode", "tile", "queue", "encode", "route", "deliver")


@dataclass
class RequestStats:
    """Statistics of one request. Durations are in seconds; dictionaries are in the order in which stages ran.

    Attributes:
        request_id: The `X-Request-Id` of the request.
        arrived: Monotonic time of arrival.
        stages: Duration of each stage of the gateway.
        vision_stages: Duration of each stage of the vision worker, of the slowest image where several ran in parallel.
        seconds_to_engine: Time from arrival until the request was sent to vLLM; None before that.
        images: The fields of the `X-DvD-Images` header; empty for a request without images.
        error_code: Code of the error that the request ended with.
        generates_text: Whether its API generates text, so that its total duration is recorded.
    """

    request_id: str
    arrived: float = field(default_factory=time.monotonic)
    stages: dict[str, float] = field(default_factory=dict)
    vision_stages: dict[str, float] = field(default_factory=dict)
    seconds_to_engine: float | None = None
    images: dict[str, int] = field(default_factory=dict)
    error_code: str | None = None
    generates_text: bool = False

    def add_stage(self, stage: str, seconds: float) -> None:
        """Add the duration of a stage. A stage runs twice if the request is retried."""
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    def add_vision_timings(self, timings: pb.Timings) -> None:
        """Add the durations that a vision worker measured for an Encode call of this request."""
        for stage in _VISION_STAGES:
            self.vision_stages[stage] = max(self.vision_stages.get(stage, 0.0), getattr(timings, stage))

    def mark_sent_to_engine(self) -> None:
        """Record that the request is sent to vLLM now. Only the first call counts."""
        if self.seconds_to_engine is None:
            self.seconds_to_engine = self.elapsed()

    def elapsed(self) -> float:
        """Return the seconds since arrival."""
        return time.monotonic() - self.arrived

    @property
    def cache_result(self) -> str | None:
        """Whether the sink had the embeddings: `hit` (all), `part`, `miss` (none); None for a request without images."""
        images, reused = self.images.get("images", 0), self.images.get("reused", 0)
        if not images:
            return None
        return "hit" if reused == images else "part" if reused else "miss"

    def server_timing(self) -> str:
        """Render the `Server-Timing` header (W3C), in milliseconds. The stages `wait` to `deliver` are part of `vision`."""
        durations = self.stages | self.vision_stages | {"total": self.elapsed()}
        return ", ".join(f"{stage};dur={1e3 * seconds:.1f}" for stage, seconds in durations.items())
