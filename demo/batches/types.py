"""Types of the batches."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class PatchTargets:
    """Labels of the patches of many tiles, int64 [tiles, patches] each. See `PatchLabels` for their values."""

    kind: Tensor
    colour: Tensor
    order_in_tile: Tensor
    digit_index: Tensor
    position: Tensor
    centre: Tensor


@dataclass
class PatchBatch:
    """Tiles to train the vision tower on.

    Attributes:
        tiles: uint8 [n, side, side, 3].
        crop_origins: int64 [n, 2], see `DemoModel.forward`.
        foreground: bool [n, patches, 49]: which of the 7 × 7 cells of a patch, two pixels wide, differ from the background.
        targets: Labels of the patches.
    """

    tiles: Tensor
    crop_origins: Tensor
    foreground: Tensor
    targets: PatchTargets


@dataclass
class ConversationRows:
    """Conversations packed one after another into one row per prefix, int64 [prefixes, length] each, padded on the right.

    The conversations of a row follow its prefix and do not attend to each other.

    Attributes:
        ids: Token ids.
        labels: Id of the next token where it belongs to an answer, else −100.
        positions: Position in the conversation, from 0.
        conversations: Index of the conversation in the batch, −1 for padding.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    conversations: Tensor

    @property
    def answer_mask(self) -> Tensor:
        """Where the next token belongs to an answer, bool [prefixes, length]."""
        return self.labels >= 0

    @property
    def answer_ids(self) -> Tensor:
        """Labels without those that are ignored, [answer tokens]."""
        return self.labels[self.answer_mask]


@dataclass
class ConversationBatch:
    """Images of equal tile count, one or two per prefix, and conversations about them.

    Attributes:
        tiles: uint8 [images · tiles, side, side, 3].
        crop_origins: int64 [images · tiles, 2], see `DemoModel.forward`.
        targets: Labels of the patches, or None.
        compressed: bool [images, tiles]: which tiles take the short path. Every prefix has the same number of them.
        images_per_prefix: 1 or 2.
        opening: Token ids before the first image of a prefix.
        separator: Token ids between two images.
        closing: Token ids after the last image.
        rows: Conversations that follow the prefixes.
        tasks: Task of each conversation; "chain" for more than one turn.
        counted: For each conversation that counts, the shape's `PatchLabels.kind` and the count, else (0, 0).
        text_rows: Conversations without an image.
    """

    tiles: Tensor
    crop_origins: Tensor
    targets: PatchTargets | None
    compressed: Tensor
    images_per_prefix: int
    opening: list[int]
    separator: list[int]
    closing: list[int]
    rows: ConversationRows
    tasks: list[str]
    counted: list[tuple[int, int]]
    text_rows: ConversationRows

    @property
    def single_image_targets(self) -> PatchTargets | None:
        """The patch labels if every prefix has one image, else None."""
        return self.targets if self.images_per_prefix == 1 else None

    @property
    def path(self) -> str:
        """Path of the tiles: "long", "short" or "mixed"."""
        return "short" if bool(self.compressed.all()) else "mixed" if bool(self.compressed.any()) else "long"
