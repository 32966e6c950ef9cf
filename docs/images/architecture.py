"""Draws architecture.png beside this file: `python docs/images/architecture.py`."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 1400, 640
INK, SOFT, IMAGE, TEXT = "#1c2733", "#5b6b7b", "#c2410c", "#1d4ed8"
FILLS = {"gateway": "#eef4ff", "vision": "#fff4e8", "language": "#eefaf0", "part": "#ffffff"}


class Drawing:
    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH, HEIGHT), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, words: str, size: int = 17, colour: str = INK, anchor: str = "mm") -> None:
        self.draw.multiline_text((x, y), words, colour, ImageFont.load_default(size), anchor, spacing=5, align="center")

    def box(self, area: tuple[int, int, int, int], title: str, below: str, fill: str) -> None:
        self.draw.rounded_rectangle(area, 12, FILLS[fill], INK, 2)
        middle = (area[0] + area[2]) / 2
        self.text(middle, area[1] + 26, title, 21)
        self.text(middle, (area[1] + 44 + area[3]) / 2, below, 16, SOFT)

    def arrow(self, points: list[tuple[int, int]], words: str, at: tuple[int, int], colour: str) -> None:
        self.draw.line(points, colour, 4, joint="curve")
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        self.draw.polygon(
            [(x, y), (x - 14 * dx - 8 * dy, y - 14 * dy - 8 * dx), (x - 14 * dx + 8 * dy, y - 14 * dy + 8 * dx)], colour
        )
        self.text(*at, words, 16, colour)


def main() -> None:
    d = Drawing()
    d.box((40, 230, 180, 350), "client", "OpenAI-style\nHTTP", "part")
    d.box((330, 190, 610, 390), "gateway", "parse, fetch, key,\nchoose workers\n\nno torch, no embedding", "gateway")
    d.box((820, 40, 1360, 220), "vision workers 1 to N", "", "vision")
    steps = ["decode\n+ cut", "batch\nof tiles", "InternViT", "router", "projector\n256 | 64"]
    for i, step in enumerate(steps):
        left = 840 + i * 104
        d.draw.rounded_rectangle((left, 100, left + 92, 180), 8, "white", SOFT, 2)
        d.text(left + 46, 140, step, 15)
    d.draw.rounded_rectangle((820, 330, 1360, 610), 12, FILLS["language"], INK, 2)
    d.text(1090, 592, "language workers 1 to M", 21)
    d.box((850, 355, 1010, 455), "sink", "checks bytes", "part")
    d.box((1150, 355, 1335, 455), "/dev/shm", "one file a key", "part")
    d.box((850, 490, 1335, 570), "vLLM", "language model, KV cache, decoding", "part")

    d.arrow([(180, 270), (330, 270)], "request", (255, 250), TEXT)
    d.arrow([(330, 320), (180, 320)], "answer, streamed", (255, 342), TEXT)
    d.arrow([(470, 190), (470, 130), (820, 130)], "1  Encode: image bytes", (645, 108), IMAGE)
    d.arrow([(930, 220), (930, 355)], "2  Deliver: embedding", (1040, 285), IMAGE)
    d.arrow([(1010, 405), (1150, 405)], "", (0, 0), IMAGE)
    d.arrow([(1240, 455), (1240, 490)], "", (0, 0), IMAGE)
    d.text(1290, 473, "4  map", 16, IMAGE)
    d.arrow([(470, 390), (470, 530), (850, 530)], "3  chat request: key + token count", (655, 508), TEXT)
    d.text(300, 560, "orange: the image and its embedding", 16, IMAGE)
    d.text(300, 590, "blue: text and tokens", 16, TEXT)
    d.image.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
