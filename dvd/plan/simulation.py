"""Requests through vision and language workers, event by event: what queueing does, which ratios alone do not show.

The workers are modelled as this system's are. A vision worker prepares images on its cores, looks at batches of tiles of
any requests, first come first served, and sends each embedding when its last tile is done. A language worker runs steps:
every sequence that goes on gets a token, and what is left of the step's tokens reads prompts, in parts where they are long.
"""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dvd.plan.model import Costs, Fleet, Kind, Load, visual_tokens

Action = Callable[[], None]


@dataclass(eq=False)
class _Request:
    kind: Kind
    arrived: float
    images: int  # that are still on their way
    left: int  # tokens to read
    read: int = 0  # tokens that were
    unseen: int = 0  # tiles to encode before it is read: in a colocated engine
    begun: bool = False
    said: list[float] = field(default_factory=list)  # when each token of the answer came


@dataclass
class _Clock:
    """Events in order of time."""

    now: float = 0.0
    _events: list[tuple[float, int, Action]] = field(default_factory=list)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def after(self, seconds: float, action: Action) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), action))

    def run(self) -> None:
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()


class _Cores:
    """As many servers with one queue."""

    def __init__(self, clock: _Clock, count: int) -> None:
        self._clock, self._free = clock, count
        self._waiting: deque[tuple[float, Action]] = deque()
        self.busy = 0.0

    def do(self, seconds: float, then: Action) -> None:
        self._waiting.append((seconds, then))
        self._next()

    def _next(self) -> None:
        while self._free and self._waiting:
            seconds, then = self._waiting.popleft()
            self._free -= 1
            self.busy += seconds
            self._clock.after(seconds, lambda then=then: self._done(then))  # type: ignore[misc]

    def _done(self, then: Action) -> None:
        self._free += 1
        then()
        self._next()


@dataclass(eq=False)
class _Image:
    total: int  # tiles
    bytes: int
    then: Action
    taken: int = 0  # tiles in batches
    seen: int = 0  # tiles that are done


class _Vision:
    """One vision worker."""

    def __init__(self, clock: _Clock, costs: Costs) -> None:
        self._clock, self._costs = clock, costs.vision
        self._cores, self._wire = _Cores(clock, costs.vision.cores), _Cores(clock, 1)
        self._queue: deque[_Image] = deque()
        self._running = False
        self.outstanding = 0
        self.busy = self.sent = 0.0

    @property
    def preparing(self) -> float:
        return self._cores.busy

    def encode(self, image: _Image) -> None:
        self.outstanding += image.total
        self._cores.do(image.total * self._costs.prepare, lambda: self._prepared(image))

    def _prepared(self, image: _Image) -> None:
        self._queue.append(image)
        self._form()

    def _form(self) -> None:
        if self._running or not self._queue:
            return
        batch: list[tuple[_Image, int]] = []
        room = self._costs.batch_tiles
        while room and self._queue:
            image = self._queue[0]
            some = min(room, image.total - image.taken)
            batch.append((image, some))
            room -= some
            image.taken += some
            if image.taken == image.total:
                self._queue.popleft()
        seconds = self._costs.batch + self._costs.tile * sum(some for _, some in batch)
        self._running = True
        self.busy += seconds
        self._clock.after(seconds, lambda: self._looked(batch))

    def _looked(self, batch: list[tuple[_Image, int]]) -> None:
        self._running = False
        for image, some in batch:
            image.seen += some
            self.outstanding -= some
            if image.seen == image.total:
                self.sent += image.bytes
                self._wire.do(image.bytes / self._costs.network, image.then)
        self._form()


class _Language:
    """One language worker; a colocated one also encodes what it is about to read."""

    def __init__(self, clock: _Clock, costs: Costs, ended: Callable[[_Request], None]) -> None:
        self._clock, self._costs, self._ended = clock, costs, ended
        self._waiting: deque[_Request] = deque()
        self._going: list[_Request] = []
        self._running = False
        self.outstanding = 0
        self.busy = self.looking = 0.0

    def serve(self, request: _Request) -> None:
        """One that `outstanding` counts already: it was promised when it came."""
        self._waiting.append(request)
        self._step()

    def _step(self) -> None:
        if self._running or not (self._waiting or self._going):
            return
        engine, eye = self._costs.language, self._costs.vision
        room = engine.step_tokens - len(self._going)
        tiles = begun = 0
        reading = 0.0
        while self._waiting and room > 0 and len(self._going) < engine.sequences:
            request = self._waiting[0]
            tiles += request.unseen
            request.unseen = 0
            begun += not request.begun
            request.begun = True
            some = min(room, request.left)
            reading += engine.reading(some, request.read)
            request.left -= some
            request.read += some
            room -= some
            if request.left:
                break
            self._going.append(self._waiting.popleft())
        speaking = list(self._going)
        looking = tiles * eye.tile + eye.batch * -(-tiles // eye.batch_tiles)
        seconds = engine.step + engine.request * begun + reading + engine.decode * len(speaking) + looking
        self._running = True
        self.busy += seconds
        self.looking += looking
        self._clock.after(seconds, lambda: self._stepped(speaking))

    def _stepped(self, speaking: list[_Request]) -> None:
        self._running = False
        for request in speaking:
            request.said.append(self._clock.now)
            if len(request.said) == request.kind.output:
                self._going.remove(request)
                self.outstanding -= 1
                self._ended(request)
        self._step()


@dataclass(frozen=True)
class Outcome:
    """Of one run. `busy`: share of the time that a stage's workers worked, on average over them."""

    throughput: float  # requests a second
    ttft: list[float]
    itl: list[float]
    busy: dict[str, float]
    network: float  # bytes a second from one vision worker

    @property
    def bottleneck(self) -> str:
        return max(self.busy, key=lambda stage: self.busy[stage])


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; 0 of nothing."""
    if not values:
        return 0.0
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class _Run:
    def __init__(self, costs: Costs, load: Load, fleet: Fleet, requests: int, in_flight: int | None, seed: int) -> None:
        self.costs, self.load, self.fleet = costs, load, fleet
        self.clock, self.random = _Clock(), random.Random(seed)
        eyes = fleet.vision if fleet.deployment == "decoupled" else 0
        self.vision = [_Vision(self.clock, costs) for _ in range(eyes)]
        self.language = [_Language(self.clock, costs, self._ended) for _ in range(fleet.language)]
        self.hosts = [_Cores(self.clock, 1) for _ in self.language]  # an engine prepares images on one thread
        self.done: list[_Request] = []
        self._left = requests
        if in_flight is None:
            at = 0.0
            for _ in range(requests):
                at += self.random.expovariate(load.rate)
                self.clock.after(at, self._arrive)
        else:
            for _ in range(min(in_flight, requests)):
                self._arrive()
        self._in_flight = in_flight
        self.clock.run()

    def _arrive(self) -> None:
        self._left -= 1
        (kind,) = self.random.choices(self.load.kinds, [kind.weight for kind in self.load.kinds])
        tiles = kind.images * kind.tiles
        fresh = sum(self.random.random() >= kind.repeated for _ in range(kind.images))
        read = kind.text + visual_tokens(self.costs, tiles, self.load.compressed)
        request = _Request(kind, self.clock.now, fresh, read)
        worker = min(self.language, key=lambda worker: worker.outstanding)
        worker.outstanding += 1
        if self.fleet.deployment == "colocated":
            request.unseen = fresh * kind.tiles
            host = self.hosts[self.language.index(worker)]
            host.do(fresh * kind.tiles * self.costs.vision.prepare, lambda: worker.serve(request))
        elif not fresh:
            worker.serve(request)
        else:
            size = visual_tokens(self.costs, kind.tiles, self.load.compressed) * self.costs.bytes_per_token
            for _ in range(fresh):
                eye = min(self.vision, key=lambda eye: eye.outstanding)
                eye.encode(_Image(kind.tiles, size, lambda: self._seen(request, worker)))

    def _seen(self, request: _Request, worker: _Language) -> None:
        request.images -= 1
        if not request.images:
            worker.serve(request)

    def _ended(self, request: _Request) -> None:
        self.done.append(request)
        if self._in_flight and self._left:
            self._arrive()

    def outcome(self) -> Outcome:
        seconds = max(self.clock.now, 1e-9)
        engines = len(self.language)
        busy = {"language": sum(worker.busy for worker in self.language) / engines / seconds}
        if self.vision:
            eyes = len(self.vision)
            busy["vision"] = sum(eye.busy for eye in self.vision) / eyes / seconds
            busy["preparation"] = sum(e.preparing for e in self.vision) / eyes / self.costs.vision.cores / seconds
            busy["network"] = sum(e.sent for e in self.vision) / eyes / self.costs.vision.network / seconds
        else:
            busy["preparation"] = sum(host.busy for host in self.hosts) / engines / seconds
        sent = sum(eye.sent for eye in self.vision) / max(1, len(self.vision)) / seconds
        gaps = [b - a for request in self.done for a, b in itertools.pairwise(request.said)]
        return Outcome(_throughput(self.done, self._in_flight), [r.said[0] - r.arrived for r in self.done], gaps, busy, sent)


def _throughput(done: Sequence[_Request], in_flight: int | None) -> float:
    """Neither start nor end counts: between the first and the last tenth of the ends, or, of so many at once, from when as
    many have ended until none waits any more. Requests count by their `share`: whole ones, all alike, end in waves.
    """
    ends = [request.said[-1] for request in done]
    tenth = len(ends) // 10
    first, last = ends[tenth], ends[-1 - tenth]
    if in_flight and len(ends) > 2 * in_flight:
        first, last = ends[in_flight - 1], max(request.arrived for request in done)
    if last <= first:
        return len(ends) / max(ends[-1], 1e-9)
    return sum(share(request.said, len(request.said), first, last) for request in done) / (last - first)


def share(said: Sequence[float], tokens: int, first: float, last: float) -> float:
    """How much of a request of so many tokens fell between: half for the first token, half for the others; `said`: when."""
    came = [first < at <= last for at in said]
    if not came:
        return 0.0
    return 0.5 * came[0] + 0.5 * (sum(came[1:]) / (tokens - 1) if tokens > 1 else came[0])


def simulate(
    costs: Costs, load: Load, fleet: Fleet, requests: int = 600, in_flight: int | None = None, seed: int = 0
) -> Outcome:
    """Serve so many requests: arriving at `load.rate`, or as many at once as `in_flight`, one following another."""
    return _Run(costs, load, fleet, requests, in_flight, seed).outcome()
