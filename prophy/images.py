"""Images that videos begin with: from a file's bytes, which anybody may have sent, to pixels of one size."""

import io

import numpy as np
from PIL import ExifTags, Image

from prophy.errors import ProPhyError
from prophy.picture import cut_share

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 32 * 2**20
MAX_PIXELS = 50_000_000  # 150 MB as RGB; more than any camera of a telephone takes
MAX_SCANS = 100  # of a JPEG: a few bytes are a pass over all pixels; progressive ones have about 10
_SCAN = b"\xff\xda"  # what a scan holds never looks like this
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # the others hold more than 8 bits

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a stored picture upright, by its orientation."""


def read_image(content: bytes, name: str) -> Image.Image:
    """The picture in a file, RGB, upright by its EXIF orientation; what is transparent becomes white.

    Args:
        content: the file's; its format is what it holds, whatever its name says.
        name: for the message.

    Raises:
        ProPhyError: too large, of another format, animated, damaged, or of more than 8 bits.
    """
    if len(content) > MAX_BYTES:
        raise ProPhyError(f"{name} has {len(content)} bytes; give an image of at most {MAX_BYTES}")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ProPhyError(
                    f"{name} has {image.width}x{image.height} pixels; give an image of at most {MAX_PIXELS}"
                )
            if image.format not in ("PNG", "WEBP"):  # a JPEG, to which Pillow may give another name
                if (scans := content.count(_SCAN)) > MAX_SCANS:
                    raise ProPhyError(f"{name} has {scans} scans; give a JPEG of at most {MAX_SCANS}")
            elif getattr(image, "is_animated", False):
                raise ProPhyError(f"{name} is animated; give a single picture")
            if image.mode not in _MODES:
                raise ProPhyError(f"{name} has more than 8 bits a channel; give an image of 8")
            image.load()
            # Not `ImageOps.exif_transpose`, which writes EXIF anew, and fails where that is a little wrong.
            turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            upright = image if turn is None else image.transpose(turn)
            if not upright.has_transparency_data:
                return upright.convert("RGB")
            transparent, white = upright.convert("RGBA"), Image.new("RGB", upright.size, "white")
            white.paste(transparent, mask=transparent)
            return white
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        raise ProPhyError(f"{name} is no image that can be read; give a {', '.join(FORMATS)} file") from None


def fit_image(image: Image.Image, height: int, width: int) -> np.ndarray:
    """An image cut at its centre to an aspect ratio, as clips are, and resized: uint8 `[H, W, 3]`."""
    high, wide = cut_share(image.height, image.width, width / height)
    left, top = (1 - wide) / 2 * image.width, (1 - high) / 2 * image.height
    box = (left, top, image.width - left, image.height - top)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box))
