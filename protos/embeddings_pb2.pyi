from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    BFLOAT16: _ClassVar[Dtype]
    FLOAT16: _ClassVar[Dtype]
    FLOAT32: _ClassVar[Dtype]
    INT8: _ClassVar[Dtype]
    FP8: _ClassVar[Dtype]
DTYPE_UNSPECIFIED: Dtype
BFLOAT16: Dtype
FLOAT16: Dtype
FLOAT32: Dtype
INT8: Dtype
FP8: Dtype

class CheckpointDescription(_message.Message):
    __slots__ = ("fingerprint", "family", "width", "tile_size", "tokens_per_tile", "compressed_tokens_per_tile", "min_tiles", "max_tiles", "thumbnail", "relative_threshold", "absolute_threshold")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    TILE_SIZE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_TILE_FIELD_NUMBER: _ClassVar[int]
    COMPRESSED_TOKENS_PER_TILE_FIELD_NUMBER: _ClassVar[int]
    MIN_TILES_FIELD_NUMBER: _ClassVar[int]
    MAX_TILES_FIELD_NUMBER: _ClassVar[int]
    THUMBNAIL_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    ABSOLUTE_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    family: str
    width: int
    tile_size: int
    tokens_per_tile: int
    compressed_tokens_per_tile: int
    min_tiles: int
    max_tiles: int
    thumbnail: bool
    relative_threshold: float
    absolute_threshold: float
    def __init__(self, fingerprint: _Optional[str] = ..., family: _Optional[str] = ..., width: _Optional[int] = ..., tile_size: _Optional[int] = ..., tokens_per_tile: _Optional[int] = ..., compressed_tokens_per_tile: _Optional[int] = ..., min_tiles: _Optional[int] = ..., max_tiles: _Optional[int] = ..., thumbnail: _Optional[bool] = ..., relative_threshold: _Optional[float] = ..., absolute_threshold: _Optional[float] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LanguageDescription(_message.Message):
    __slots__ = ("checkpoint", "dtype", "http", "used_bytes", "budget_bytes", "draining", "language_fingerprint", "sink", "model_dtype")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HTTP_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    LANGUAGE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SINK_FIELD_NUMBER: _ClassVar[int]
    MODEL_DTYPE_FIELD_NUMBER: _ClassVar[int]
    checkpoint: CheckpointDescription
    dtype: Dtype
    http: str
    used_bytes: int
    budget_bytes: int
    draining: bool
    language_fingerprint: str
    sink: str
    model_dtype: Dtype
    def __init__(self, checkpoint: _Optional[_Union[CheckpointDescription, _Mapping]] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., http: _Optional[str] = ..., used_bytes: _Optional[int] = ..., budget_bytes: _Optional[int] = ..., draining: _Optional[bool] = ..., language_fingerprint: _Optional[str] = ..., sink: _Optional[str] = ..., model_dtype: _Optional[_Union[Dtype, str]] = ...) -> None: ...

class GrantTerms(_message.Message):
    __slots__ = ("sink", "address", "key", "max_bytes", "expires")
    SINK_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_FIELD_NUMBER: _ClassVar[int]
    sink: str
    address: str
    key: str
    max_bytes: int
    expires: float
    def __init__(self, sink: _Optional[str] = ..., address: _Optional[str] = ..., key: _Optional[str] = ..., max_bytes: _Optional[int] = ..., expires: _Optional[float] = ...) -> None: ...

class Grant(_message.Message):
    __slots__ = ("terms", "signature")
    TERMS_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    terms: bytes
    signature: bytes
    def __init__(self, terms: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class HasRequest(_message.Message):
    __slots__ = ("keys", "expect_seconds")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    EXPECT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[str]
    expect_seconds: float
    def __init__(self, keys: _Optional[_Iterable[str]] = ..., expect_seconds: _Optional[float] = ...) -> None: ...

class HasReply(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class EmbeddingHeader(_message.Message):
    __slots__ = ("key", "fingerprint", "dtype", "rows", "width", "length", "grant")
    KEY_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    key: str
    fingerprint: str
    dtype: Dtype
    rows: int
    width: int
    length: int
    grant: bytes
    def __init__(self, key: _Optional[str] = ..., fingerprint: _Optional[str] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., rows: _Optional[int] = ..., width: _Optional[int] = ..., length: _Optional[int] = ..., grant: _Optional[bytes] = ...) -> None: ...

class DeliverChunk(_message.Message):
    __slots__ = ("header", "data", "placed")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    PLACED_FIELD_NUMBER: _ClassVar[int]
    header: EmbeddingHeader
    data: bytes
    placed: Placed
    def __init__(self, header: _Optional[_Union[EmbeddingHeader, _Mapping]] = ..., data: _Optional[bytes] = ..., placed: _Optional[_Union[Placed, _Mapping]] = ...) -> None: ...

class Placed(_message.Message):
    __slots__ = ("transport", "length", "partial")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    transport: str
    length: int
    partial: bool
    def __init__(self, transport: _Optional[str] = ..., length: _Optional[int] = ..., partial: _Optional[bool] = ...) -> None: ...

class DeliverReply(_message.Message):
    __slots__ = ("already_here",)
    ALREADY_HERE_FIELD_NUMBER: _ClassVar[int]
    already_here: bool
    def __init__(self, already_here: _Optional[bool] = ...) -> None: ...
