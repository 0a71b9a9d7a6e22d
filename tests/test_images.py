"""Images that videos begin with: whatever their format, and whoever sent them."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from prophy import images
from prophy.errors import ProPhyError
from prophy.images import fit_image, read_image


def content(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(height: int, width: int) -> Image.Image:
    """Red grows to the right, green to the bottom."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.zeros_like(red)], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("format", images.FORMATS)
def test_formats_are_told_by_content(format: str) -> None:
    picture = gradient(20, 30)
    read = read_image(content(picture, format, quality=95), "cat.txt")
    assert (read.mode, read.size) == ("RGB", (30, 20))
    assert np.abs(np.asarray(read).astype(int) - np.asarray(picture)).mean() < 3


@pytest.mark.parametrize("format", images.FORMATS)
def test_a_telephones_picture_is_upright(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    turned = read_image(content(gradient(20, 30), format, exif=exif, quality=95), "photo")
    assert turned.size == (20, 30)
    upright = np.rot90(np.asarray(gradient(20, 30)), -1).astype(int)
    assert np.abs(np.asarray(turned) - upright).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_also_beside_exif_that_is_wrong(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = orientation, 3.5
    resolution_as_text = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")
    assert resolution_as_text != exif.tobytes()
    stored = gradient(20, 30)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content(stored, exif=exif))))
    read = read_image(content(stored, exif=resolution_as_text), "photo")
    assert np.array_equal(np.asarray(read), np.asarray(expected))


def test_a_telephones_second_view_is_left_out() -> None:
    picture = gradient(20, 30)
    two = content(picture, "MPO", save_all=True, append_images=[Image.new("RGB", (30, 20))], quality=95)
    assert np.abs(np.asarray(read_image(two, "photo")).astype(int) - np.asarray(picture)).mean() < 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_any_usual_kind_of_pixels_becomes_rgb(mode: str) -> None:
    white = read_image(content(Image.new("RGB", (4, 4), "white").convert(mode)), "white")
    assert np.array_equal(np.asarray(white), np.full((4, 4, 3), 255))


def test_what_is_transparent_is_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    pixels = np.asarray(read_image(content(clear), "clear"))
    assert pixels[0, 0].tolist() == [255, 0, 0] and (pixels[1:] == 255).all()


def test_what_is_no_image_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    png = content(gradient(20, 30))
    for bad in (b"", b"GIF89a", content(gradient(4, 4), "GIF"), png[: len(png) // 2], b"\0" * 100):
        with pytest.raises(ProPhyError, match="photo is no image that can be read; give a PNG, JPEG, WEBP"):
            read_image(bad, "photo")
    with pytest.raises(ProPhyError, match="more than 8 bits a channel"):
        read_image(content(Image.new("I;16", (4, 4))), "photo")
    for format in ("PNG", "WEBP"):
        moving = content(gradient(4, 4), format, save_all=True, append_images=[gradient(4, 4).rotate(90)])
        with pytest.raises(ProPhyError, match="photo is animated; give a single picture"):
            read_image(moving, "photo")
    jpeg = content(gradient(20, 30), "JPEG", progressive=True)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    with pytest.raises(ProPhyError, match=r"photo has 1\d\d scans; give a JPEG of at most 100"):
        read_image(jpeg[:-2] + 100 * last + jpeg[-2:], "photo")
    monkeypatch.setattr(images, "MAX_PIXELS", 500)
    with pytest.raises(ProPhyError, match="30x20 pixels; give an image of at most 500"):
        read_image(png, "photo")
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    with pytest.raises(ProPhyError, match="bytes; give an image of at most 10"):
        read_image(png, "photo")


def test_an_image_is_cut_at_its_centre_and_not_stretched() -> None:
    wide = fit_image(gradient(100, 400), 50, 50)
    assert wide.shape == (50, 50, 3) and wide.dtype == np.uint8
    assert wide[:, 0, 0].mean() == pytest.approx(255 * 3 / 8, abs=3)
    assert wide[:, -1, 0].mean() == pytest.approx(255 * 5 / 8, abs=3)
    assert wide[0, :, 1].mean() < 3 and wide[-1, :, 1].mean() > 252
    assert np.array_equal(fit_image(gradient(50, 60), 50, 60), np.asarray(gradient(50, 60)))
