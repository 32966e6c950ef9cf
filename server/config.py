"""Options of the gateway."""

import ipaddress
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from common.options import ADDRESS_PATTERN, AdminOptions, ImageLimits, ShutdownOptions, TraceOptions
from common.security import ProcessOptions
from common.tiling import MAX_TILES

_NAME = re.compile(r"dns:[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?:\d+")


def _worker_address(text: str) -> str:
    """Return `text` if it is a static address or a `dns:` name; raise a validation error otherwise."""
    match = _NAME.fullmatch(text) or re.fullmatch(ADDRESS_PATTERN, text)
    port = text.rpartition(":")[2]
    if not match or not (text.startswith("unix:") or 0 < int(port) < 1 << 16):
        raise PydanticCustomError(
            "address", "expected HOST:PORT, [IPV6]:PORT, unix:/PATH, or dns:NAME:PORT for every address of a name"
        )
    return text


_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/?#@*\s]+")


def _origin(text: str) -> str:
    """Return `text` if it is `*` or an origin as browsers send it; raise a validation error otherwise."""
    if not _ORIGIN.fullmatch(text):
        raise PydanticCustomError("address", "expected * or origins such as https://chat.example.org, without a path")
    return text


def _network(text: str) -> str:
    """Return `text` if it is an address or a network of addresses; raise a validation error otherwise."""
    try:
        ipaddress.ip_network(text)
    except ValueError:
        raise PydanticCustomError("address", "expected addresses or networks such as 10.0.0.5 or 10.0.0.0/8") from None
    return text


Origin = Annotated[str, AfterValidator(_origin)]
Network = Annotated[str, AfterValidator(_network)]
WorkerAddress = Annotated[str, AfterValidator(_worker_address)]


class ServingOptions(ImageLimits, TraceOptions, ShutdownOptions):
    """Options of the gateway that `dvd up` has too: HTTP, limits and the router's defaults."""

    host: str = Field("127.0.0.1", description="address the gateway listens on")
    port: int = Field(8000, ge=0, le=65535, description="port the gateway listens on")
    api_key: SecretStr | None = Field(None, description="bearer token that callers must send; unset: no authentication")
    docs: bool = Field(False, description="serve an interactive page of the API at /docs; it loads scripts from a CDN")
    cors_origins: list[Origin] = Field(
        default=[], description="origins whose pages may call the API from a browser, comma-separated, or *; unset: none"
    )
    trusted_proxies: list[Network] = Field(
        default=[],
        description="proxies whose X-Forwarded-For names the caller's address, comma-separated; unset: the header is ignored",
    )
    allow_private_images: bool = Field(
        False, description="also fetch images over http and from private addresses: only if every caller is trusted"
    )
    max_images: int = Field(32, ge=1, description="maximum number of images in a request; each frame of a video counts")
    max_image_bytes: int = Field(32 << 20, ge=1, description="maximum size of an image file in bytes")
    max_video_bytes: int = Field(64 << 20, ge=1, description="maximum size of a video file in bytes")
    max_body_bytes: int = Field(128 << 20, ge=1, description="maximum size of a request body in bytes")
    max_in_flight: int = Field(
        512,
        ge=1,
        description="maximum number of concurrent sequences, of requests with images and of others; more are answered 429",
    )
    max_bodies_bytes: int = Field(
        1 << 30,
        ge=1,
        description="maximum size of all request bodies in flight, with the files fetched for them, in bytes; more: 429",
    )
    max_sequences: int = Field(
        128, ge=1, description="maximum number of sequences of a request: n times its prompts; each one counts as a request"
    )
    max_output_tokens: int = Field(
        1 << 20,
        ge=1,
        description="maximum number of tokens of a request's sequences together, each counted as long as it may become",
    )
    max_prompt_characters: int | None = Field(
        None,
        ge=1,
        description="maximum number of characters of a prompt with all other texts; unset: 16 for each token of the context",
    )
    max_json_values: int = Field(
        500_000, ge=1000, description="maximum number of values in a request's JSON; separators in texts count too"
    )
    compiled_tools: bool = Field(
        False,
        description="vLLM compiles the schemas of all tools (--tool-strict-level=parameter), so bound them all like those that "
        "must be called",
    )
    max_connections: int = Field(
        4096, ge=1, description="maximum number of connections; beyond it, those without a complete request are closed"
    )
    head_timeout: float = Field(
        20.0, gt=0, description="seconds in which a request's line and headers must arrive; later it is answered 408"
    )
    min_body_rate: int = Field(
        1024, ge=1, description="bytes per second at which a body must arrive after 10 s; a slower one is answered 408"
    )
    max_queue_seconds: float = Field(
        4.0, gt=0, description="estimated wait for a vision or language worker above which requests are answered 429"
    )
    retry_share: float = Field(
        0.2, ge=0, le=1, description="attempts that may be repeated on another worker, as a share of all requests"
    )
    early_prefill: bool = Field(
        True, description="forward a request whose visual tokens can be counted beforehand once its first image is encoded"
    )
    hedge_share: float = Field(
        0.0, ge=0, le=0.5, description="slow encodes that are also sent to a second worker, as a share of all; 0: none"
    )
    degrade_after: float | None = Field(
        None,
        gt=0,
        description="estimated wait in seconds at which images are degraded by one more level each time; unset: never",
    )
    degrade_threshold: float = Field(
        0.25, ge=0, le=1, description="lowest relative threshold of the router to which degradation goes"
    )
    degrade_tiles: int = Field(4, ge=1, le=MAX_TILES, description="lowest maximum number of tiles to which degradation goes")
    workers: int = Field(1, ge=1, le=64, description="gateway processes; they share the port and the limits of load")
    fetch_timeout: float = Field(20.0, gt=0, description="timeout in seconds to fetch an image or video")
    fetch_user_agent: str | None = Field(
        None,
        max_length=256,
        pattern=r"^[!-~]([ -~]*[!-~])?$",
        description="User-Agent header of fetches, in printable ASCII; unset: dvd-serve/VERSION (+URL of the project)",
    )
    request_timeout: float = Field(600.0, gt=0, description="deadline of a request in seconds; later it is answered 504")
    keep_alive_timeout: int = Field(
        620, ge=1, description="seconds until an idle connection is closed: more than the load balancer's own timeout"
    )
    shutdown_delay: float = Field(
        2.0, ge=0, description="seconds of --shutdown-grace in which the gateway still accepts connections, but is not ready"
    )
    stream_keep_alive: float = Field(
        15.0, ge=0, description="seconds without an event until a stream sends a keep-alive comment; 0: never"
    )
    router_scope: Literal["image", "request"] = Field(
        "image", description="tiles over which the router computes its quantile; request: like the official code"
    )
    vir: Literal["auto", "off", "all"] = Field(
        "auto", description="tiles to compress by default: those the router selects, none, or all"
    )
    vir_relative_threshold: float | None = Field(
        None, ge=0, le=1, description="quantile that a compressed tile's score must exceed, 0 to 1; unset: the checkpoint's"
    )
    vir_absolute_threshold: float | None = Field(
        None, ge=0, le=1, description="minimum score of a compressed tile, 0 to 1; unset: the checkpoint's"
    )
    allow_vir: bool = Field(True, description="requests may set vir; false: requests that set it are rejected")
    max_tiles: int | None = Field(
        None, ge=1, le=MAX_TILES, description="maximum number of tiles of an image without thumbnail; unset: the checkpoint's"
    )

    @field_validator("api_key")
    @classmethod
    def _is_key_that_can_be_sent(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        key = value.get_secret_value().strip()
        if not key:
            raise PydanticCustomError("key", "the key is empty; leave it unset for no authentication")
        if not (key.isascii() and key.isprintable()):
            raise PydanticCustomError("key", "expected printable ASCII characters, which fit into a header")
        return SecretStr(key)

    @field_validator("vir", mode="before")
    @classmethod
    def _accept_yaml_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads a bare `off` as false

    @field_validator("vir_relative_threshold", "vir_absolute_threshold")
    @classmethod
    def _only_auto_has_thresholds(cls, value: float | None, info: ValidationInfo) -> float | None:
        mode = info.data.get("vir", "auto")
        if value is not None and mode != "auto":
            raise PydanticCustomError("threshold", "thresholds require --vir=auto, not {mode}", {"mode": mode})
        return value


class GatewayOptions(ServingOptions, AdminOptions, ProcessOptions):
    """`dvd gateway`: the OpenAI-compatible HTTP server in front of workers that run elsewhere."""

    command: ClassVar[str] = "gateway"

    vision_workers: list[WorkerAddress] = Field(
        min_length=1,
        description="vision workers, comma-separated: HOST:PORT, unix:/PATH, or dns:NAME:PORT for every address of a name",
    )
    language_workers: list[WorkerAddress] = Field(
        min_length=1, description="sinks of the language workers, comma-separated, in the same forms"
    )
