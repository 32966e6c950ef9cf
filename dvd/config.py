"""Options of the commands that are not a process of their own: `up`, `describe`, `health`, `drain`."""

import re
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from common.options import ADDRESS_PATTERN, MODEL_DESCRIPTION, Address, Model, Options
from common.security import PeerOptions


def _health_address(text: str) -> str:
    if not re.fullmatch(rf"{ADDRESS_PATTERN}|https?://[^/@＠﹫?#\s]+/\S+", text):
        raise PydanticCustomError("address", "expected HOST:PORT, [IPV6]:PORT, unix:/PATH, or http://HOST:PORT/health/ready")
    return text


class DescribeOptions(Options):
    """`dvd describe MODEL`: print the checkpoint's description as JSON."""

    command: ClassVar[str] = "describe"

    model: Model = Field(description=MODEL_DESCRIPTION)


class HealthOptions(PeerOptions):
    """`dvd health ADDRESS`: exit with status 0 if the process at ADDRESS can serve requests, else with 1."""

    command: ClassVar[str] = "health"

    address: Annotated[str, AfterValidator(_health_address)] = Field(
        description="a worker (HOST:PORT, unix:/PATH), or a gateway's http://HOST:PORT/health/ready or /health/live"
    )
    timeout: float = Field(5.0, gt=0, description="probe timeout in seconds")


class DrainOptions(PeerOptions):
    """`dvd drain ADDRESS`: let the process with the admin listener at ADDRESS finish its requests and exit."""

    command: ClassVar[str] = "drain"

    address: Address = Field(description="the process' --admin: HOST:PORT or unix:/PATH")
    wait: float | None = Field(None, gt=0, description="seconds to wait until the process has ended; unset: do not wait")
