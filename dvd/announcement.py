"""Output of `dvd up` during and after the start: progress, the URL, and an example request to paste."""

import asyncio
import base64
import io
import shlex
import time
from collections.abc import Sequence

from common.http_get import http_is_ok
from common.hub import served_name
from dvd.output import print_status
from dvd.up_config import UpOptions
from dvd.up_processes import ProcessSpec, gateway_address

_PROBE_INTERVAL_SECONDS = 0.5


async def announce_readiness(specs: Sequence[ProcessSpec], options: UpOptions) -> None:
    """Wait until every process and the system as a whole is ready, printing each, and print the URL with an example."""
    begin = time.monotonic()
    await asyncio.gather(*(_wait_until_ready(spec, options.log_format) for spec in specs))
    while not await http_is_ok(gateway_address(options), "/health/ready"):
        await asyncio.sleep(_PROBE_INTERVAL_SECONDS)
    ready = f"ready in {time.monotonic() - begin:.0f} s: {_url(options)}  (Ctrl-C stops everything)"
    example = f"\n\n{_example_command(options)}\n" if options.log_format == "text" else ""
    print_status(ready + example, options.log_format)


async def _wait_until_ready(spec: ProcessSpec, log_format: str) -> None:
    """Wait for one process, which itself reports what it does meanwhile."""
    begin = time.monotonic()
    while not await spec.is_ready():
        await asyncio.sleep(_PROBE_INTERVAL_SECONDS)
    print_status(f"{spec.name}: ready in {time.monotonic() - begin:.1f} s", log_format)


def _url(options: UpOptions) -> str:
    return f"http://{gateway_address(options)}"


def _example_command(options: UpOptions) -> str:
    """Return a curl command with an image inline, which works as it is pasted."""
    body = (
        '{"model": "' + served_name(options.model) + '", "max_tokens": 16, "messages": [{"role": "user", "content": ['
        '{"type": "image_url", "image_url": {"url": "data:image/png;base64,' + _red_disc_png() + '"}}, '
        '{"type": "text", "text": "What colour is the circle?"}]}]}'
    )
    key = " -H 'Authorization: Bearer YOUR_KEY'" if options.api_key else ""
    return f"curl {_url(options)}/v1/chat/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"


def _red_disc_png() -> str:
    """Return a small PNG, base64-encoded: a red disc on white."""
    from PIL import Image, ImageDraw  # here, not at import: only the announcement needs it

    image = Image.new("P", (224, 224))
    image.putpalette([255, 255, 255, 220, 30, 30])
    ImageDraw.Draw(image).ellipse((56, 56, 168, 168), fill=1)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True, bits=1)
    return base64.b64encode(file.getvalue()).decode()
