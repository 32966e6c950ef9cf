"""Discrete-event simulation of requests through vision and language workers, for the effects of queueing.

The model follows this system's workers. A vision worker prepares images on its cores, encodes batches of tiles of any
requests in order of arrival, and sends each embedding when its last tile is done. A language worker runs steps: every running
sequence gets a token, and the rest of the step's token budget prefills prompts, in chunks if they are long. All times are in
seconds.
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
    arrival: float
    pending_images: int  # whose embeddings have not been delivered
    prompt_left: int  # tokens still to prefill
    prefilled: int = 0  # tokens
    tiles_to_encode: int = 0  # by the language worker itself, in a colocated deployment
    started: bool = False
    token_times: list[float] = field(default_factory=list)  # of the output


@dataclass
class _Clock:
    """The simulated time and the queue of events."""

    now: float = 0.0
    _events: list[tuple[float, int, Action]] = field(default_factory=list)
    _sequence: "itertools.count[int]" = field(default_factory=itertools.count)

    def after(self, seconds: float, action: Action) -> None:
        """Run `action` after a number of seconds."""
        heapq.heappush(self._events, (self.now + seconds, next(self._sequence), action))

    def run(self) -> None:
        """Run all events, and those that they schedule, in order of time."""
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()


class _Cores:
    """Several servers with one queue, first in, first out."""

    def __init__(self, clock: _Clock, count: int) -> None:
        self._clock, self._free = clock, count
        self._waiting: deque[tuple[float, Action]] = deque()
        self.busy_seconds = 0.0

    def submit(self, seconds: float, then: Action) -> None:
        """Queue work that takes a number of seconds, and run `then` when it is done."""
        self._waiting.append((seconds, then))
        self._start_next()

    def _start_next(self) -> None:
        while self._free and self._waiting:
            seconds, then = self._waiting.popleft()
            self._free -= 1
            self.busy_seconds += seconds
            self._clock.after(seconds, lambda then=then: self._done(then))  # type: ignore[misc]

    def _done(self, then: Action) -> None:
        self._free += 1
        then()
        self._start_next()


@dataclass(eq=False)
class _Image:
    tiles: int
    embedding_bytes: int
    then: Action  # when the embedding is delivered
    batched: int = 0  # tiles
    encoded: int = 0  # tiles


class _Vision:
    """One vision worker."""

    def __init__(self, clock: _Clock, costs: Costs) -> None:
        self._clock, self._costs = clock, costs.vision
        self._cores, self._network = _Cores(clock, costs.vision.cores), _Cores(clock, 1)
        self._queue: deque[_Image] = deque()
        self._running = False
        self.outstanding_tiles = 0
        self.busy_seconds = self.sent_bytes = 0.0

    @property
    def preparation_seconds(self) -> float:
        """Core seconds of preparation."""
        return self._cores.busy_seconds

    def encode(self, image: _Image) -> None:
        """Prepare and encode an image, and deliver its embedding."""
        self.outstanding_tiles += image.tiles
        self._cores.submit(image.tiles * self._costs.prepare, lambda: self._enqueue(image))

    def _enqueue(self, image: _Image) -> None:
        self._queue.append(image)
        self._start_batch()

    def _start_batch(self) -> None:
        if self._running or not self._queue:
            return
        batch: list[tuple[_Image, int]] = []
        room = self._costs.batch_tiles
        while room and self._queue:
            image = self._queue[0]
            tiles = min(room, image.tiles - image.batched)
            batch.append((image, tiles))
            room -= tiles
            image.batched += tiles
            if image.batched == image.tiles:
                self._queue.popleft()
        seconds = self._costs.batch + self._costs.tile * sum(tiles for _, tiles in batch)
        self._running = True
        self.busy_seconds += seconds
        self._clock.after(seconds, lambda: self._end_batch(batch))

    def _end_batch(self, batch: list[tuple[_Image, int]]) -> None:
        self._running = False
        for image, tiles in batch:
            image.encoded += tiles
            self.outstanding_tiles -= tiles
            if image.encoded == image.tiles:
                self.sent_bytes += image.embedding_bytes
                self._network.submit(image.embedding_bytes / self._costs.network, image.then)
        self._start_batch()


class _Language:
    """One language worker. In a colocated deployment it also encodes the images of the prompts that it prefills."""

    def __init__(self, clock: _Clock, costs: Costs, on_end: Callable[[_Request], None]) -> None:
        self._clock, self._costs, self._on_end = clock, costs, on_end
        self._waiting: deque[_Request] = deque()
        self._decoding: list[_Request] = []
        self._running = False
        self.outstanding_requests = 0  # also those whose images are still being encoded
        self.busy_seconds = 0.0

    def serve(self, request: _Request) -> None:
        """Queue a request whose embeddings have been delivered. `outstanding_requests` counts it since its arrival."""
        self._waiting.append(request)
        self._start_step()

    def _start_step(self) -> None:
        if self._running or not (self._waiting or self._decoding):
            return
        engine, vision = self._costs.language, self._costs.vision
        room = engine.step_tokens - len(self._decoding)
        tiles = started = 0
        prefill_seconds = 0.0
        while self._waiting and room > 0 and len(self._decoding) < engine.sequences:
            request = self._waiting[0]
            tiles += request.tiles_to_encode
            request.tiles_to_encode = 0
            started += not request.started
            request.started = True
            tokens = min(room, request.prompt_left)
            prefill_seconds += engine.prefill_seconds(tokens, request.prefilled)
            request.prompt_left -= tokens
            request.prefilled += tokens
            room -= tokens
            if request.prompt_left:
                break
            self._decoding.append(self._waiting.popleft())
        batch = list(self._decoding)
        encode_seconds = tiles * vision.tile + vision.batch * -(-tiles // vision.batch_tiles)
        seconds = engine.step + engine.request * started + prefill_seconds + engine.decode * len(batch) + encode_seconds
        self._running = True
        self.busy_seconds += seconds
        self._clock.after(seconds, lambda: self._end_step(batch))

    def _end_step(self, batch: list[_Request]) -> None:
        self._running = False
        for request in batch:
            request.token_times.append(self._clock.now)
            if len(request.token_times) == request.kind.output:
                self._decoding.remove(request)
                self.outstanding_requests -= 1
                self._on_end(request)
        self._start_step()


@dataclass(frozen=True)
class Outcome:
    """Result of one run.

    Attributes:
        throughput: requests a second.
        ttft: time to the first token of each request, in seconds.
        itl: inter-token latencies of all requests, in seconds.
        busy: share of the time in which the workers of a stage were busy, by stage, averaged over them.
        network: bytes a second that one vision worker sends.
    """

    throughput: float
    ttft: list[float]
    itl: list[float]
    busy: dict[str, float]
    network: float

    @property
    def bottleneck(self) -> str:
        """The busiest stage."""
        return max(self.busy, key=lambda stage: self.busy[stage])


def percentile(values: Sequence[float], share: float) -> float:
    """Return the percentile of `share` (0 to 1) by nearest rank; 0 if there are no values."""
    if not values:
        return 0.0
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class _Run:
    """One simulation. See `simulate` for the arguments."""

    def __init__(self, costs: Costs, load: Load, fleet: Fleet, requests: int, in_flight: int | None, seed: int) -> None:
        self.costs, self.load, self.fleet = costs, load, fleet
        self.clock, self.random = _Clock(), random.Random(seed)
        vision_workers = fleet.vision if fleet.deployment == "decoupled" else 0
        self.vision = [_Vision(self.clock, costs) for _ in range(vision_workers)]
        self.language = [_Language(self.clock, costs, self._on_end) for _ in range(fleet.language)]
        self.hosts = [_Cores(self.clock, 1) for _ in self.language]  # a colocated engine prepares images on one thread
        self.completed: list[_Request] = []
        self._to_send = requests
        if in_flight is None:
            arrival = 0.0
            for _ in range(requests):
                arrival += self.random.expovariate(load.rate)
                self.clock.after(arrival, self._arrive)
        else:
            for _ in range(min(in_flight, requests)):
                self._arrive()
        self._in_flight = in_flight
        self.clock.run()

    def _arrive(self) -> None:
        self._to_send -= 1
        (kind,) = self.random.choices(self.load.kinds, [kind.weight for kind in self.load.kinds])
        tiles = kind.images * kind.tiles
        new_images = sum(self.random.random() >= kind.repeated for _ in range(kind.images))
        prompt = kind.text + visual_tokens(self.costs, tiles, self.load.compressed)
        request = _Request(kind, self.clock.now, new_images, prompt)
        worker = min(self.language, key=lambda worker: worker.outstanding_requests)
        worker.outstanding_requests += 1
        if self.fleet.deployment == "colocated":
            request.tiles_to_encode = new_images * kind.tiles
            host = self.hosts[self.language.index(worker)]
            host.submit(new_images * kind.tiles * self.costs.vision.prepare, lambda: worker.serve(request))
        elif not new_images:
            worker.serve(request)
        else:
            size = visual_tokens(self.costs, kind.tiles, self.load.compressed) * self.costs.bytes_per_token
            for _ in range(new_images):
                encoder = min(self.vision, key=lambda encoder: encoder.outstanding_tiles)
                encoder.encode(_Image(kind.tiles, size, lambda: self._on_delivery(request, worker)))

    def _on_delivery(self, request: _Request, worker: _Language) -> None:
        request.pending_images -= 1
        if not request.pending_images:
            worker.serve(request)

    def _on_end(self, request: _Request) -> None:
        self.completed.append(request)
        if self._in_flight and self._to_send:
            self._arrive()

    def outcome(self) -> Outcome:
        """Return the result, once the constructor has run the simulation."""
        seconds = max(self.clock.now, 1e-9)
        engines = len(self.language)
        busy = {"language": sum(worker.busy_seconds for worker in self.language) / engines / seconds}
        if self.vision:
            count, costs = len(self.vision), self.costs.vision
            busy["vision"] = sum(worker.busy_seconds for worker in self.vision) / count / seconds
            busy["preparation"] = sum(worker.preparation_seconds for worker in self.vision) / count / costs.cores / seconds
            busy["network"] = sum(worker.sent_bytes for worker in self.vision) / count / costs.network / seconds
        else:
            busy["preparation"] = sum(host.busy_seconds for host in self.hosts) / engines / seconds
        return Outcome(
            throughput=_throughput(self.completed, self._in_flight),
            ttft=[request.token_times[0] - request.arrival for request in self.completed],
            itl=[after - before for request in self.completed for before, after in itertools.pairwise(request.token_times)],
            busy=busy,
            network=sum(worker.sent_bytes for worker in self.vision) / max(1, len(self.vision)) / seconds,
        )


def _throughput(completed: Sequence[_Request], in_flight: int | None) -> float:
    """Return requests a second in a window without the start and the end of the run.

    With random arrivals, the window lies between the first and the last tenth of the completions. With a fixed number in
    flight, it begins when as many requests have completed and ends with the last arrival. A request counts by its
    `share_in_window`, because whole requests of one kind complete in waves.
    """
    ends = [request.token_times[-1] for request in completed]
    tenth = len(ends) // 10
    first, last = ends[tenth], ends[-1 - tenth]
    if in_flight and len(ends) > 2 * in_flight:
        first, last = ends[in_flight - 1], max(request.arrival for request in completed)
    if last <= first:
        return len(ends) / max(ends[-1], 1e-9)
    shares = (share_in_window(request.token_times, len(request.token_times), first, last) for request in completed)
    return sum(shares) / (last - first)


def share_in_window(token_times: Sequence[float], tokens: int, first: float, last: float) -> float:
    """Return the share of a request that lies in a window: half for its first token, half for the others.

    Args:
        token_times: when each token arrived.
        tokens: number of tokens of the whole answer.
        first: begin of the window, exclusive.
        last: end of the window, inclusive.
    """
    inside = [first < time <= last for time in token_times]
    if not inside:
        return 0.0
    return 0.5 * inside[0] + 0.5 * (sum(inside[1:]) / (tokens - 1) if tokens > 1 else inside[0])


def simulate(
    costs: Costs, load: Load, fleet: Fleet, requests: int = 600, in_flight: int | None = None, seed: int = 0
) -> Outcome:
    """Simulate the given number of requests.

    Args:
        costs: costs of the stages.
        load: kinds of requests and their rate.
        fleet: the workers.
        requests: number of requests.
        in_flight: None: requests arrive at random at `load.rate`; else the constant number of concurrent requests.
        seed: seed of the random numbers.
    """
    return _Run(costs, load, fleet, requests, in_flight, seed).outcome()
