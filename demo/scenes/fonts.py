"""Font files from Python packages, and their metrics. The held-out fonts are never trained on."""

import functools
import importlib.util
from pathlib import Path

from PIL import ImageFont

_TRAINING_FONTS = {
    "matplotlib": (
        "mpl-data/fonts/ttf",
        ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "cmr10", "cmb10", "cmss10"),
    ),
    "font_roboto": (
        "files",
        ("Roboto-Regular", "Roboto-Bold", "Roboto-Medium", "Roboto-Italic", "Roboto-Light", "Roboto-Black"),
    ),
    "font_source_sans_pro": (
        "files",
        ("SourceSansPro-Regular", "SourceSansPro-Bold", "SourceSansPro-Semibold", "SourceSansPro-It"),
    ),
    "font_source_serif_pro": ("files", ("SourceSerifPro-Regular", "SourceSerifPro-Bold", "SourceSerifPro-Semibold")),
    "font_caladea": ("files", ("Caladea-Regular", "Caladea-Bold", "Caladea-Italic")),
}
_HELD_OUT_FONTS = {
    "font_hanken_grotesk": ("files", ("HankenGrotesk-Regular", "HankenGrotesk-Bold")),
    "matplotlib": ("mpl-data/fonts/ttf", ("STIXGeneral", "STIXGeneralBol")),
}


@functools.cache
def font_files(held_out: bool) -> tuple[str, ...]:
    """Paths of the fonts of training, or of the held-out ones.

    Raises:
        ModuleNotFoundError: A package with fonts is not installed.
        FileNotFoundError: A package lacks one of its fonts.
    """
    files: list[str] = []
    for package, (folder, names) in (_HELD_OUT_FONTS if held_out else _TRAINING_FONTS).items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"Font package {package!r} is not installed. Run: pip install -e '.[demo]'")
        for name in names:
            files.append(str(_font_file(Path(spec.submodule_search_locations[0]) / folder, name)))
    return tuple(files)


def _font_file(folder: Path, name: str) -> Path:
    for suffix in (".ttf", ".otf"):
        if (folder / (name + suffix)).exists():
            return folder / (name + suffix)
    raise FileNotFoundError(f"No font {name!r} (.ttf or .otf) in {folder}.")


@functools.lru_cache(maxsize=512)
def load_font(file: str, size: int) -> ImageFont.FreeTypeFont:
    """A font at a size in pixels. Fonts are cached."""
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def digit_height(file: str) -> float:
    """Height of the digit zero, in ems."""
    box = load_font(file, 200).getbbox("0")
    return (box[3] - box[1]) / 200
