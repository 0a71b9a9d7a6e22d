"""What shapes take from pictures: refused where they stretch, told where they cut."""

import json
from dataclasses import astuple

import pyarrow as pa
import pytest

from pipelines.caching.shapes import check_shapes, misfits, stretch
from pipelines.config import Config, VideoLimits, load_config
from pipelines.config.loading import preset_names
from prophy.errors import ProPhyError
from prophy.schema import PRIORS

# Height and width of what cameras and telephones record.
DCI_4K, UHD, GOPRO, ON_END, SQUARE, DVD = (
    (2160, 4096),
    (2160, 3840),
    (3000, 4000),
    (1920, 1080),
    (1080, 1080),
    (480, 640),
)


def clips(*pictures: tuple[int, int]) -> pa.Table:
    """A clip of each picture's height and width, by its place."""
    sources = [{"uri": f"/{place}.mp4", "size": 1, "modified": 1.0} for place in range(len(pictures))]
    heights, widths = zip(*pictures, strict=True)
    columns = {"source": sources, "height": heights, "width": widths}
    return pa.Table.from_pydict(columns, pa.schema([PRIORS.field(name) for name in columns]))


def shaped(vlm: str, backbone: str) -> Config:
    overrides = list[str]()
    for section, shapes in {"vlm": vlm, "backbone": backbone}.items():
        height, width = json.loads(shapes)[0]
        overrides += [f"{section}.height={height}", f"{section}.width={width}"]
        overrides.append(f"{section}.aspect_buckets={shapes}")
    return load_config("tiny", overrides)


@pytest.mark.parametrize("preset", preset_names())
def test_presets_cut_a_little_of_usual_pictures_and_stretch_none(preset: str) -> None:
    config = load_config(preset)
    check_shapes(config)
    if preset == "tiny":
        return
    for picture in (DCI_4K, UHD, GOPRO, ON_END, SQUARE, DVD):
        assert picture[0] * picture[1] <= VideoLimits().max_pixels
        cut, stretched = misfits(clips(picture), config)
        # A model of one size cuts what it must, and the summary tells it.
        assert cut is None or cut.share < (0.12 if config.backbone.aspect_buckets else 0.7)
        assert stretched is None or stretched.share < 0.05


def test_the_worst_is_named() -> None:
    config = shaped("[[64,64]]", "[[64,64]]")
    cut, stretched = misfits(clips((64, 64), (100, 101), (64, 128), (300, 100)), config)
    assert cut is not None and astuple(cut) == (2, "/3.mp4", pytest.approx(2 / 3))
    assert stretched is None
    cut, stretched = misfits(clips((64, 128), (64, 64)), shaped("[[64,64],[64,128]]", "[[64,64],[64,124]]"))
    assert cut is None
    assert stretched is not None and astuple(stretched) == (1, "/0.mp4", pytest.approx(128 / 124 - 1))
    assert misfits(clips((64, 64))[:0], config) == (None, None)


def test_a_clip_counts_as_its_video() -> None:
    of_one_video = pa.concat_tables([clips((64, 128)), clips((64, 128))])
    cut, _ = misfits(of_one_video, shaped("[[64,64]]", "[[64,64]]"))
    assert cut is not None and astuple(cut) == (1, "/0.mp4", pytest.approx(0.5))


@pytest.mark.parametrize(
    ("vlm", "backbone", "message"),
    [
        (
            "[[64,128]]",
            "[[64,64]]",
            "vlm takes clips of 128x64, .* backbone is 64x64, .* stretch them 2.00 times",
        ),
        (
            "[[64,64]]",
            "[[64,64],[128,64]]",
            "backbone takes clips of 64x128, the nearest shape of vlm is 64x64",
        ),
        (
            "[[128,64],[64,64]]",
            "[[64,64]]",
            "vlm takes clips of 64x128, the nearest shape of backbone is 64x64",
        ),
    ],
)
def test_shapes_without_a_partner_are_refused(vlm: str, backbone: str, message: str) -> None:
    with pytest.raises(ProPhyError, match=f"{message}.*; set vlm.aspect_buckets and backbone.aspect_buckets"):
        check_shapes(shaped(vlm, backbone))


def test_a_few_per_cent_pass() -> None:
    check_shapes(shaped("[[480,832]]", "[[464,832]]"))
    assert stretch((480, 832), (464, 832)) == stretch((464, 832), (480, 832)) == pytest.approx(480 / 464)
