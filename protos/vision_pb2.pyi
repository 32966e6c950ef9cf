from protos import embeddings_pb2 as _embeddings_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class VisionDescription(_message.Message):
    __slots__ = ("checkpoint", "device", "dtype", "draining", "stalled", "batch_tiles", "tiles_per_second", "embedding_dtypes", "spare")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    STALLED_FIELD_NUMBER: _ClassVar[int]
    BATCH_TILES_FIELD_NUMBER: _ClassVar[int]
    TILES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_DTYPES_FIELD_NUMBER: _ClassVar[int]
    SPARE_FIELD_NUMBER: _ClassVar[int]
    checkpoint: _embeddings_pb2.CheckpointDescription
    device: str
    dtype: _embeddings_pb2.Dtype
    draining: bool
    stalled: str
    batch_tiles: int
    tiles_per_second: float
    embedding_dtypes: _containers.RepeatedScalarFieldContainer[_embeddings_pb2.Dtype]
    spare: bool
    def __init__(self, checkpoint: _Optional[_Union[_embeddings_pb2.CheckpointDescription, _Mapping]] = ..., device: _Optional[str] = ..., dtype: _Optional[_Union[_embeddings_pb2.Dtype, str]] = ..., draining: _Optional[bool] = ..., stalled: _Optional[str] = ..., batch_tiles: _Optional[int] = ..., tiles_per_second: _Optional[float] = ..., embedding_dtypes: _Optional[_Iterable[_Union[_embeddings_pb2.Dtype, str]]] = ..., spare: _Optional[bool] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("key", "data", "grant")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    key: str
    data: bytes
    grant: bytes
    def __init__(self, key: _Optional[str] = ..., data: _Optional[bytes] = ..., grant: _Optional[bytes] = ...) -> None: ...

class Tiling(_message.Message):
    __slots__ = ("min_tiles", "max_tiles")
    MIN_TILES_FIELD_NUMBER: _ClassVar[int]
    MAX_TILES_FIELD_NUMBER: _ClassVar[int]
    min_tiles: int
    max_tiles: int
    def __init__(self, min_tiles: _Optional[int] = ..., max_tiles: _Optional[int] = ...) -> None: ...

class Router(_message.Message):
    __slots__ = ("mode", "relative_threshold", "absolute_threshold")
    class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        AUTO: _ClassVar[Router.Mode]
        OFF: _ClassVar[Router.Mode]
        ALL: _ClassVar[Router.Mode]
    AUTO: Router.Mode
    OFF: Router.Mode
    ALL: Router.Mode
    MODE_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    ABSOLUTE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    mode: Router.Mode
    relative_threshold: float
    absolute_threshold: float
    def __init__(self, mode: _Optional[_Union[Router.Mode, str]] = ..., relative_threshold: _Optional[float] = ..., absolute_threshold: _Optional[float] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("images", "tiling", "router", "dtype", "deliver_to", "fingerprint", "caller", "scope", "dry_run")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    TILING_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DELIVER_TO_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[Image]
    tiling: Tiling
    router: Router
    dtype: _embeddings_pb2.Dtype
    deliver_to: str
    fingerprint: str
    caller: str
    scope: bytes
    dry_run: bool
    def __init__(self, images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., tiling: _Optional[_Union[Tiling, _Mapping]] = ..., router: _Optional[_Union[Router, _Mapping]] = ..., dtype: _Optional[_Union[_embeddings_pb2.Dtype, str]] = ..., deliver_to: _Optional[str] = ..., fingerprint: _Optional[str] = ..., caller: _Optional[str] = ..., scope: _Optional[bytes] = ..., dry_run: _Optional[bool] = ...) -> None: ...

class EncodeReply(_message.Message):
    __slots__ = ("images", "timings", "cached")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[EncodedImage]
    timings: Timings
    cached: bool
    def __init__(self, images: _Optional[_Iterable[_Union[EncodedImage, _Mapping]]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., cached: _Optional[bool] = ...) -> None: ...

class EncodedImage(_message.Message):
    __slots__ = ("key", "tokens", "columns", "rows", "compressed", "scores")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSED_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    key: str
    tokens: int
    columns: int
    rows: int
    compressed: _containers.RepeatedScalarFieldContainer[bool]
    scores: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, key: _Optional[str] = ..., tokens: _Optional[int] = ..., columns: _Optional[int] = ..., rows: _Optional[int] = ..., compressed: _Optional[_Iterable[bool]] = ..., scores: _Optional[_Iterable[float]] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("wait", "decode", "tile", "queue", "encode", "route", "deliver")
    WAIT_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    TILE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    DELIVER_FIELD_NUMBER: _ClassVar[int]
    wait: float
    decode: float
    tile: float
    queue: float
    encode: float
    route: float
    deliver: float
    def __init__(self, wait: _Optional[float] = ..., decode: _Optional[float] = ..., tile: _Optional[float] = ..., queue: _Optional[float] = ..., encode: _Optional[float] = ..., route: _Optional[float] = ..., deliver: _Optional[float] = ...) -> None: ...
