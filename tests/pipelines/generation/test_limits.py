"""What is refused before a model is loaded: no networks, configurations alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines.generation.limits import check_batch, check_model, shape_limits
from prophy.backbones.families import FAMILIES
from prophy.errors import ProPhyError
from prophy.tiny.pipeline import pipeline_folder
from tests.conftest import tiny_config

COGVIDEOX: dict[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "text_embed_dim": 4096,
    "num_attention_heads": 48,
    "max_text_seq_length": 226,
}
LEARNT = {
    "in_channels": 32,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,
}


def write_configs(
    folder: Path, pipeline: dict[str, Any], vae: dict[str, Any], transformer: dict[str, Any]
) -> str:
    """A model without weights: what is read of one before it is loaded."""
    contents = {"model_index": pipeline, "vae/config": vae, "transformer/config": transformer}
    for name, content in contents.items():
        (folder / f"{name}.json").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def cogvideox(folder: Path, transformer: dict[str, Any]) -> tuple[str, ...]:
    """Overrides of a configuration with a CogVideoX of 49 frames of 480x720."""
    pipeline = {"_class_name": "CogVideoXPipeline"}
    pretrained = write_configs(folder, pipeline, {"block_out_channels": [1] * 4}, COGVIDEOX | transformer)
    settings = ("family=cogvideox", f"pretrained={pretrained}", "max_sequence_length=226")
    shape = ("num_frames=49", "height=480", "width=720")
    return ("checkpoint=null", *(f"backbone.{setting}" for setting in (*settings, *shape)))


def test_a_model_with_learnt_positions_makes_one_shape(tmp_path: Path) -> None:
    overrides = cogvideox(tmp_path / "model", LEARNT)
    config = tiny_config(tmp_path / "run", *overrides)
    check_model(config)
    limits = shape_limits(config)
    assert limits.only == (49, 480, 720)
    limits.check_size(480, 720)
    assert limits.num_frames(49 / 8, 8.0) == 49
    with pytest.raises(ProPhyError, match="480x320 does not fit this model, which makes 720x480 alone"):
        limits.check_size(320, 480)
    with pytest.raises(ProPhyError, match="are 25 frames; this model makes 49 alone"):
        limits.num_frames(3.0, 8.0)
    for other in ("num_frames=25", "height=320"):
        with pytest.raises(ProPhyError, match="learnt positions of 49 frames of 480x720 alone"):
            check_model(tiny_config(tmp_path / "run", *overrides, f"backbone.{other}"))


def test_more_tokens_than_a_model_has_positions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="101 tokens long, high or wide, and .* positions of 64"):
        check_model(tiny_config(tmp_path, "backbone.num_frames=401"))
    with pytest.raises(ProPhyError, match="101 tokens long, high or wide, and .* positions of 64"):
        shape_limits(tiny_config(tmp_path, "serve.max_num_frames=402"))


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("num_frames=20", r"cannot encode 20 frames of 64x64; take 4 n \+ 1 frames"),
        ("width=72", "tiny makes no videos of 64x72; .*height to a multiple of 16 and backbone.width to one"),
    ],
)
def test_a_shape_that_the_pipeline_would_change(tmp_path: Path, setting: str, reason: str) -> None:
    with pytest.raises(ProPhyError, match=reason):
        check_model(tiny_config(tmp_path, f"backbone.{setting}"))


@pytest.mark.parametrize("transformer", [{}, LEARNT])
def test_positions_that_are_added_to_text_fix_its_length(tmp_path: Path, transformer: dict[str, Any]) -> None:
    overrides = cogvideox(tmp_path / "model", transformer)
    check_model(tiny_config(tmp_path / "run", *overrides))
    with pytest.raises(ProPhyError, match="max_sequence_length, which is 224, to 226"):
        check_model(tiny_config(tmp_path / "run", *overrides, "backbone.max_sequence_length=224"))
    rotary = COGVIDEOX | {"use_rotary_positional_embeddings": True}
    assert FAMILIES["cogvideox"].text(rotary, 224) == {"prompt_embeds": (224, 4096)}


def test_guidance_of_the_second_transformer_alone(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    index = json.loads((pipeline_folder() / "model_index.json").read_text())
    vae, transformer = (
        json.loads((pipeline_folder() / part / "config.json").read_text()) for part in ("vae", "transformer")
    )
    two = index | {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}
    pretrained = write_configs(folder, two, vae, transformer)
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    overrides = ("checkpoint=null", f"backbone.pretrained={pretrained}", "sampling.guidance_scale_2=3")
    check_model(tiny_config(tmp_path / "run", *overrides))
    with pytest.raises(
        ProPhyError, match="guidance_scale_2 is 3, but a sampling.guidance_scale of 1 switche"
    ):
        check_model(tiny_config(tmp_path / "run", *overrides, "sampling.guidance_scale=1"))


def test_a_wan_that_embeds_images_takes_one_at_a_time(tmp_path: Path) -> None:
    pipeline, vae = {"_class_name": "WanImageToVideoPipeline"}, {"z_dim": 16}
    transformer = {"in_channels": 36, "out_channels": 16, "patch_size": [1, 2, 2]}
    for image_dim in (None, 1280):
        pretrained = write_configs(tmp_path / "model", pipeline, vae, transformer | {"image_dim": image_dim})
        overrides = ("checkpoint=null", f"backbone.pretrained={pretrained}")
        batches = tiny_config(tmp_path / "run", *overrides, "generate.batch_size=2")
        check_batch(batches, has_images=False)
        check_batch(tiny_config(tmp_path / "run", *overrides), has_images=True)
        if image_dim is None:
            check_batch(batches, has_images=True)
            continue
        with pytest.raises(ProPhyError, match="one at a time; set generate.batch_size, which is 2, to 1"):
            check_batch(batches, has_images=True)
