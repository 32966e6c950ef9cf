"""Draws architecture.png beside this file: `python docs/images/architecture.py`."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 1500, 760
INK, GREY = "#1c2733", "#52606d"
IMAGE_COLOUR, TEXT_COLOUR = "#c2410c", "#1d4ed8"
FILLS = {"gateway": "#eef4ff", "vision": "#fff4e8", "language": "#eefaf0", "part": "#ffffff"}

Box = tuple[int, int, int, int]
Point = tuple[int, int]


class Drawing:
    """A white canvas with boxes, arrows and text. Coordinates are pixels from the top left."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH, HEIGHT), "white")
        self._draw = ImageDraw.Draw(self.image)

    def text(self, at: Point, text: str, size: int = 16, colour: str = INK) -> None:
        """Centred text; newlines start a new line."""
        font = ImageFont.load_default(size)
        self._draw.multiline_text(at, text, colour, font, "mm", spacing=5, align="center")

    def process(self, box: Box, title: str, package: str, fill: str) -> None:
        """A process: a large box with its name and its Python package at the top."""
        self._draw.rounded_rectangle(box, 12, FILLS[fill], INK, 2)
        middle = (box[0] + box[2]) // 2
        self.text((middle, box[1] + 24), title, 21)
        self.text((middle, box[1] + 50), package, 15, GREY)

    def part(self, box: Box, title: str, detail: str = "") -> None:
        """A part of a process: a small white box."""
        self._draw.rounded_rectangle(box, 8, FILLS["part"], GREY, 2)
        middle, height = (box[0] + box[2]) // 2, box[3] - box[1]
        if detail:
            self.text((middle, box[1] + height // 3), title)
            self.text((middle, box[1] + 2 * height // 3 + 2), detail, 14, GREY)
        else:
            self.text((middle, box[1] + height // 2), title)

    def arrow(self, points: list[Point], colour: str, label: str = "", label_at: Point = (0, 0)) -> None:
        """A line through points with an arrowhead at the last one. Its segments are horizontal or vertical."""
        self._draw.line(points, colour, 4, joint="curve")
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        base = (x - 14 * dx, y - 14 * dy)
        self._draw.polygon([(x, y), (base[0] - 8 * dy, base[1] - 8 * dx), (base[0] + 8 * dy, base[1] + 8 * dx)], colour)
        if label:
            self.text(label_at, label, 16, colour)


def main() -> None:
    d = Drawing()

    d.process((30, 300, 160, 400), "client", "HTTP", "part")

    d.process((330, 60, 640, 700), "gateway", "server/", "gateway")
    parts = [
        ("http/", "authentication, admission, deadline"),
        ("apis/", "parse the body, find its images"),
        ("media/", "fetch images, extract video frames"),
        ("pipeline, placement, keys", "embeddings in place, forward, retry"),
        ("workers/", "pools, probes, choice of a worker"),
        ("vllm_response", "stream, usage, errors"),
    ]
    for i, (title, detail) in enumerate(parts):
        top = 135 + i * 93
        d.part((350, top, 620, top + 76), title, detail)

    d.process((900, 40, 1470, 270), "vision worker 1 … N", "vision_worker/", "vision")
    stages = ["decode,\ntile", "batch of\ntiles", "InternViT", "router", "projector\n256 | 64"]
    for i, stage in enumerate(stages):
        left = 920 + i * 108
        d.part((left, 115, left + 98, 190), stage)
    d.part((920, 205, 1450, 250), "embedding cache: memory or redis")

    d.process((900, 390, 1470, 720), "language worker 1 … M", "lm_worker/", "language")
    d.part((920, 470, 1120, 550), "sink", "checks and stores")
    d.part((1250, 470, 1450, 550), "/dev/shm", "one file per embedding")
    d.part((920, 620, 1450, 700), "vLLM + connector", "language model, KV cache, decoding")

    d.arrow([(160, 330), (330, 330)], TEXT_COLOUR, "request", (245, 310))
    d.arrow([(330, 370), (160, 370)], TEXT_COLOUR, "response", (245, 390))
    d.arrow([(640, 490), (920, 490)], IMAGE_COLOUR, "1  Has: which keys are stored?", (770, 468))
    d.arrow([(640, 155), (900, 155)], IMAGE_COLOUR, "2  Encode: image bytes", (770, 133))
    d.arrow([(1020, 270), (1020, 470)], IMAGE_COLOUR, "3  Deliver: embedding", (1120, 330))
    d.arrow([(1120, 510), (1250, 510)], IMAGE_COLOUR)
    d.arrow([(640, 640), (920, 640)], TEXT_COLOUR, "4  body: key + token count", (770, 618))
    d.arrow([(1350, 550), (1350, 620)], IMAGE_COLOUR, "5  map", (1395, 584))
    d.arrow([(920, 680), (640, 680)], TEXT_COLOUR, "6  response", (770, 662))

    d.text((165, 600), "orange: images and embeddings", 16, IMAGE_COLOUR)
    d.text((165, 630), "blue: text and tokens", 16, TEXT_COLOUR)
    d.image.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
