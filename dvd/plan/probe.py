"""A client for `dvd plan --from URL`: sends single requests to a gateway and returns what they took.

It uses the standard library alone, like all of `dvd`.
"""

import contextlib
import http.client
import itertools
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from common.secrets import redact_url

_TIMEOUT_SECONDS = 120.0
_SAMPLE = re.compile(r"^(\w[\w:]*)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_TIMING = re.compile(r"(\w+);dur=([\d.]+)")
_BEFORE_HOST = re.compile(r"^(\w+://)?.*[@＠﹫]", re.DOTALL)
_COUNT = re.compile(r"(\w+)=(\d+)")


class ProbeError(Exception):
    """The server cannot be measured. The message is one line."""


@dataclass(frozen=True)
class Answer:
    """What one request took.

    Attributes:
        seconds: duration of each stage, from the `Server-Timing` header.
        images: fields of the `X-DvD-Images` header; empty without images.
        prompt_tokens: tokens of the prompt, visual tokens included.
        output_tokens: tokens of the answer.
        streaming_seconds: seconds from the first to the last event with content.
    """

    seconds: dict[str, float]
    images: dict[str, int]
    prompt_tokens: int
    output_tokens: int
    streaming_seconds: float

    @property
    def token_seconds(self) -> float:
        """Seconds between two tokens of the answer."""
        return self.streaming_seconds / max(1, self.output_tokens - 1)


Samples = list[tuple[str, dict[str, str], float]]
"""Name, labels and value of each sample of a process' metrics."""


class Probe:
    """A gateway, and the requests that were sent to it."""

    def __init__(self, url: str) -> None:
        shown = redact_url(_BEFORE_HOST.sub(r"\1***@", url))
        try:
            parts = urlsplit(url)
        except ValueError:  # brackets without an address
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ProbeError(f"{shown!r}: expected http://HOST:PORT of a gateway")
        if parts.username is not None or parts.password is not None or shown != url:
            raise ProbeError(f"{shown!r}: a user name or password is not accepted; DVD_API_KEY is sent if it is set")
        self._url = url.rstrip("/")
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._headers = {"Content-Type": "application/json"}
        if key := os.environ.get("DVD_API_KEY"):
            self._headers["Authorization"] = f"Bearer {key}"
        self._numbers = itertools.count(time.time_ns())
        self._lock, self.sent_requests = threading.Lock(), 0
        self._model = ""

    def model(self) -> dict[str, Any]:
        """Return the entry of the served model in `/v1/models`, and use this model from now on."""
        models = json.loads(self._read("/v1/models"))["data"]
        self._model = models[0]["id"]
        return dict(models[0])

    def number(self) -> int:
        """Return a number that no request of this or an earlier run has used, so that nothing is cached."""
        with self._lock:
            return next(self._numbers)

    def metrics(self, path: str = "/metrics") -> Samples:
        """Return the samples of `/metrics`, or of another path."""
        text = self._read(path).decode()
        return [(name, dict(_LABEL.findall(labels)), float(value)) for name, labels, value in _SAMPLE.findall(text)]

    def answer(self, text: str, images: Sequence[str] = (), tokens: int = 1) -> Answer:
        """Send one chat request and read its answer.

        Args:
            text: the prompt.
            images: `data:` URLs.
            tokens: length of the answer.
        """
        parts = [*({"type": "image_url", "image_url": {"url": url}} for url in images), {"type": "text", "text": text}]
        body = {
            "model": self._model, "messages": [{"role": "user", "content": parts}], "max_tokens": tokens, "ignore_eos": True,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        with self._lock:
            self.sent_requests += 1
        with self._open("/v1/chat/completions", json.dumps(body).encode()) as response:
            return _read_answer(response)

    def answers(self, texts: Sequence[str], tokens: int) -> list[Answer]:
        """Send several requests at once."""
        with ThreadPoolExecutor(len(texts)) as threads:
            return list(threads.map(lambda text: self.answer(text, tokens=tokens), texts))

    def _read(self, path: str) -> bytes:
        with self._open(path, None) as response:
            return bytes(response.read())

    @contextlib.contextmanager
    def _open(self, path: str, body: bytes | None) -> Iterator[Any]:
        """Send a request, a POST if it has a body, and yield the response. Raises: `ProbeError`, also while it is read."""
        request = urllib.request.Request(f"{self._url}{path}", body, self._headers)  # noqa: S310 - http, as checked above
        try:
            with self._opener.open(request, timeout=_TIMEOUT_SECONDS) as response:
                yield response
        except urllib.error.HTTPError as error:
            with error:
                reason = _message(error.read())
            raise ProbeError(f"{self._url}{path} answered with status {error.code}: {reason}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            raise ProbeError(f"{self._url} does not answer: {reason}") from None
        except (ValueError, LookupError, TypeError):
            raise ProbeError(f"{self._url}{path}: the answer is not that of a gateway of dvd-serve") from None


def _read_answer(response: Any) -> Answer:
    """Read the events of a stream. Raises: `ProbeError`, `ValueError`, `LookupError`."""
    times, usage = list[float](), dict[str, int]()
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise ProbeError(f"a request failed: {event['error']['message']}")
        if any(choice["delta"].get("content") for choice in event["choices"]):
            times.append(time.monotonic())
        usage = event.get("usage") or usage
    return Answer(
        seconds={
            stage: float(milliseconds) / 1e3 for stage, milliseconds in _TIMING.findall(response.headers["Server-Timing"])
        },
        images={name: int(value) for name, value in _COUNT.findall(response.headers.get("X-DvD-Images", ""))},
        prompt_tokens=usage["prompt_tokens"],
        output_tokens=usage["completion_tokens"],
        streaming_seconds=times[-1] - times[0] if times else 0.0,
    )


def _message(body: bytes) -> str:
    """Return the message of an error response, or the begin of another body."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return " ".join(body.decode(errors="replace").split())[:200]
