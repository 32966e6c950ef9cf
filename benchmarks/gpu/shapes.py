"""The published shapes of InternViT and of the language models that its projectors feed; small ones for a dry run."""

from dataclasses import dataclass, replace

from common.layouts.base import Tower

INTERN_VIT_300M = Tower(1024, 4096, 24, 16, 448, 14, "layer_norm", 1e-6, "gelu", True, False)
INTERN_VIT_6B = Tower(3200, 12800, 45, 25, 448, 14, "rms_norm", 1e-6, "gelu", False, True)


@dataclass(frozen=True)
class Shape:
    """A tower, and the width of the language model behind it.

    Attributes:
        name: `300M` or `6B`.
        tower: Dimensions of the tower.
        width: Hidden size of the language model: that of Qwen3-8B for 300M, of Qwen2.5-72B for 6B.
        target: Share of the dense bf16 TFLOP/s that the device can reach, which the tower should reach (`towers.py`).
    """

    name: str
    tower: Tower
    width: int
    target: float

    @property
    def patches(self) -> int:
        """Patches of a tile."""
        return (self.tower.image_size // self.tower.patch_size) ** 2

    @property
    def flop_per_tile(self) -> float:
        """Floating point operations of the tower for one tile: two for each product of a matrix or of attention."""
        tokens, width, tower = self.patches + 1, self.tower.hidden_size, self.tower
        layer = tokens * (4 * width**2 + 2 * width * tower.intermediate_size) + 2 * tokens**2 * width
        return 2.0 * (tower.layers * layer + self.patches * 3 * tower.patch_size**2 * width)


PUBLISHED = (Shape("300M", INTERN_VIT_300M, 4096, 0.45), Shape("6B", INTERN_VIT_6B, 8192, 0.6))


def dry(shape: Shape) -> Shape:
    """Return a shape of the same kind that a CPU computes at once. The router needs a width that 16 heads can share."""
    heads = 2
    tower = replace(shape.tower, hidden_size=64, intermediate_size=128, layers=2, heads=heads, image_size=56)
    return replace(shape, tower=tower, width=32)
