"""What images cost in tiles and visual tokens, by their sizes alone; and by what the router did, where it was asked."""

from collections.abc import Sequence
from typing import Any

from common.tiling import Tiling, has_thumbnail, select_grid
from protos import embeddings_pb2
from protos import vision_pb2 as pb
from server.apis.image_options import Dial


def costs(
    sizes: Sequence[tuple[int, int]],
    dials: Sequence[Dial],
    own: embeddings_pb2.CheckpointDescription,
    most: int | None,
    routes: Sequence[pb.EncodedImage] | None,
) -> dict[str, Any]:
    """The answer of `/v1/images/tokens`. `sizes` are (width, height) in pixels; `own` and `most` are for `Dial.tiling`."""
    images = [_cost(size, dial, own, most) for size, dial in zip(sizes, dials, strict=True)]
    tokens = [image["tokens"] for image in images]
    total: dict[str, Any] = {"tiles": sum(image["tiles"]["total"] for image in images), "tokens": _sum(tokens)}
    if routes is not None:
        for image, route in zip(images, routes, strict=True):
            image["routed"] = {"tokens": route.tokens, "compressed": list(route.compressed)}
        total["routed"] = {"tokens": sum(r.tokens for r in routes), "compressed": sum(sum(r.compressed) for r in routes)}
    return {"object": "list", "images": images, "total": total}


def _cost(size: tuple[int, int], dial: Dial, own: embeddings_pb2.CheckpointDescription, most: int | None) -> dict[str, Any]:
    asked = dial.tiling(own, most)
    tiling = Tiling(asked.min_tiles, asked.max_tiles, own.thumbnail, own.tile_size)
    columns, rows = select_grid(*size, tiling)
    thumbnail = has_thumbnail(columns, rows, tiling)
    total = columns * rows + thumbnail
    off, compressed = total * own.tokens_per_tile, total * own.compressed_tokens_per_tile
    return {
        "width": size[0],
        "height": size[1],
        "tiles": {"columns": columns, "rows": rows, "thumbnail": thumbnail, "total": total},
        "mode": pb.Router.Mode.Name(dial.router.mode).lower(),
        # without a router nothing can be compressed
        "tokens": {"off": off, "all": compressed or None, "auto": [compressed or off, off]},
    }


def _sum(tokens: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of several images of one checkpoint: all of them have a router, or none has."""
    return {
        "off": sum(one["off"] for one in tokens),
        "all": None if any(one["all"] is None for one in tokens) else sum(one["all"] for one in tokens),
        "auto": [sum(one["auto"][end] for one in tokens) for end in (0, 1)],
    }
