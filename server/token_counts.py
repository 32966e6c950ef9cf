"""Tiles and visual tokens of images: by arithmetic on their sizes, and by the router's decision if it is known."""

from collections.abc import Sequence
from typing import Any

from common.tiling import Tiling, has_thumbnail, select_grid
from protos import embeddings_pb2
from protos import vision_pb2 as pb
from server.apis.image_options import ImageOptions


def token_counts(
    sizes: Sequence[tuple[int, int]],
    options: Sequence[ImageOptions],
    checkpoint: embeddings_pb2.CheckpointDescription,
    max_tiles: int | None,
    routes: Sequence[pb.EncodedImage] | None,
) -> dict[str, Any]:
    """Return the response of `/v1/images/tokens`.

    Args:
        sizes: Width and height of each image in pixels.
        options: Options of each image.
        checkpoint: The checkpoint that is served.
        max_tiles: The operator's bound for the tiles of an image, None for the checkpoint's.
        routes: What the router decided for each image; None if the request does not ask for routes.

    Raises:
        InvalidRequest: An image requests more tiles than are allowed.
    """
    images = [_image_counts(size, option, checkpoint, max_tiles) for size, option in zip(sizes, options, strict=True)]
    total: dict[str, Any] = {
        "tiles": sum(image["tiles"]["total"] for image in images),
        "tokens": _sum_tokens([image["tokens"] for image in images]),
    }
    if routes is not None:
        for image, route in zip(images, routes, strict=True):
            image["routed"] = {"tokens": route.tokens, "compressed": list(route.compressed)}
        total["routed"] = {"tokens": sum(r.tokens for r in routes), "compressed": sum(sum(r.compressed) for r in routes)}
    return {"object": "list", "images": images, "total": total}


def fewest_tokens(
    sizes: Sequence[tuple[int, int]],
    options: Sequence[ImageOptions],
    checkpoint: embeddings_pb2.CheckpointDescription,
    max_tiles: int | None,
) -> int:
    """Return the visual tokens that images need if the router compresses every tile that it may. Arguments: `token_counts`."""
    images = [_image_counts(size, option, checkpoint, max_tiles) for size, option in zip(sizes, options, strict=True)]
    return sum(image["tokens"]["off"] if image["mode"] == "off" else image["tokens"]["auto"][0] for image in images)


def most_tokens(
    options: Sequence[ImageOptions], checkpoint: embeddings_pb2.CheckpointDescription, max_tiles: int | None
) -> int:
    """Return an upper bound of the visual tokens of images of any size. Arguments: `token_counts`."""
    tiles = [option.tiling(checkpoint, max_tiles).max_tiles + checkpoint.thumbnail for option in options]
    return sum(tiles) * checkpoint.tokens_per_tile


def fixed_tokens_per_tile(router: pb.Router, checkpoint: embeddings_pb2.CheckpointDescription) -> int | None:
    """Return the visual tokens of each tile; None if the router decides about each."""
    if not checkpoint.compressed_tokens_per_tile or router.mode == pb.Router.OFF:
        return checkpoint.tokens_per_tile
    return checkpoint.compressed_tokens_per_tile if router.mode == pb.Router.ALL else None


def tile_count(size: tuple[int, int], bounds: pb.Tiling, checkpoint: embeddings_pb2.CheckpointDescription) -> int:
    """Return the number of tiles of an image of this width and height, thumbnail included."""
    tiling = Tiling(bounds.min_tiles, bounds.max_tiles, checkpoint.thumbnail, checkpoint.tile_size)
    columns, rows = select_grid(*size, tiling)
    return columns * rows + has_thumbnail(columns, rows, tiling)


def _image_counts(
    size: tuple[int, int],
    options: ImageOptions,
    checkpoint: embeddings_pb2.CheckpointDescription,
    max_tiles: int | None,
) -> dict[str, Any]:
    bounds = options.tiling(checkpoint, max_tiles)
    tiling = Tiling(bounds.min_tiles, bounds.max_tiles, checkpoint.thumbnail, checkpoint.tile_size)
    columns, rows = select_grid(*size, tiling)
    thumbnail = has_thumbnail(columns, rows, tiling)
    tiles = columns * rows + thumbnail
    full, compressed = tiles * checkpoint.tokens_per_tile, tiles * checkpoint.compressed_tokens_per_tile
    return {
        "width": size[0],
        "height": size[1],
        "tiles": {"columns": columns, "rows": rows, "thumbnail": thumbnail, "total": tiles},
        "mode": pb.Router.Mode.Name(options.router.mode).lower(),
        # without a router nothing can be compressed
        "tokens": {"off": full, "all": compressed or None, "auto": [compressed or full, full]},
    }


def _sum_tokens(tokens: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add up the counts of several images of one checkpoint: either all of them have a router or none has."""
    return {
        "off": sum(counts["off"] for counts in tokens),
        "all": None if any(counts["all"] is None for counts in tokens) else sum(counts["all"] for counts in tokens),
        "auto": [sum(counts["auto"][end] for counts in tokens) for end in (0, 1)],
    }
