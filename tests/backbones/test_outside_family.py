"""A family of another package, with two text encoders and a mask, from a clip in the cache to a video."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.caching.cache import encodings_table
from pipelines.config import Config
from pipelines.generation.sampler import VideoSampler
from pipelines.generation.spec import PhysicsSpec, VideoSpec
from pipelines.training.data import build_dataset
from pipelines.training.evaluation import held_out_losses
from pipelines.training.model import build_module
from pipelines.training.plan import make_plan
from prophy.backbones.encoding import VideoEncoder
from prophy.backbones.families import FAMILIES
from prophy.backbones.pretrained import fingerprint
from prophy.errors import ProPhyError
from prophy.models.checkpoint import save_branch
from prophy.models.control import PhysicsTrace
from prophy.training.cache import PriorCache
from prophy.training.data import PriorDataset
from prophy.training.module import ProPhyTrainModule
from tests.backbones.small_cache import write_cache
from tests.conftest import tiny_config
from tests.outside import plugged_in
from tests.wisa import PHENOMENA

CAPTIONS = ("a red ball falls", "a candle burns and burns and burns", "ice", "smoke on the left")
LENGTH = 8
SHAPES = {"prompt_embeds": (LENGTH, 12), "pooled_prompt_embeds": (6,), "prompt_attention_mask": (LENGTH,)}


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("site-packages")
    with plugged_in(folder, "prophy.backbones", "outside", "tests.backbones.outside_family:FAMILY"):
        yield


@pytest.fixture(scope="module")
def config(package: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    from tests.backbones.outside_family import write_pipeline

    folder = tmp_path_factory.mktemp("outside")
    return tiny_config(
        folder / "run",
        "backbone.family=outside",
        f"backbone.pretrained={write_pipeline(folder / 'backbone')}",
        f"backbone.max_sequence_length={LENGTH}",
        "backbone.num_frames=9",
        "backbone.fps=4",
        "backbone.height=32",
        "backbone.width=32",
        "backbone.autocast=null",
        "physics.physics_layers=[0,1]",
        "checkpoint=null",
        "train.start_from=null",
        "train.num_workers=1",
        "train.global_batch_size=2",
        "train.micro_batch_size=2",
        "train.caption_dropout=0.5",
        "train.num_held_out=1",
    )


@pytest.fixture(scope="module")
def cache(config: Config) -> PriorCache:
    return write_cache(config, CAPTIONS)


@pytest.fixture(scope="module")
def dataset(config: Config, cache: PriorCache) -> PriorDataset:
    return build_dataset(config, cache, rank=0)


@pytest.fixture(scope="module")
def trained(config: Config, cache: PriorCache, dataset: PriorDataset) -> ProPhyTrainModule:
    """After some steps, so that the branch injects something."""
    module = build_module(config, cache.null_text(), cache.phenomena)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-2)
    for step in range(3):
        [batch], captions = dataset[step]
        optimizer.zero_grad()
        module(batch, captions).loss.backward()
        optimizer.step()
    return module.eval()


@pytest.fixture(scope="module")
def model(config: Config, trained: ProPhyTrainModule) -> Path:
    folder, name = config.run_dir / "model", config.backbone.pretrained
    backbone = {"name": name, "revision": None, "fingerprint": fingerprint(name, None)}
    save_branch(trained.transformer, folder, backbone)
    return folder


def test_a_configuration_may_name_it() -> None:
    assert [*FAMILIES] == ["cogvideox", "outside", "wan"]
    assert FAMILIES["outside"].classes().pipeline.__module__ == "tests.backbones.outside_family"


def test_the_cache_holds_all_tensors_of_a_text(config: Config, cache: PriorCache) -> None:
    assert encodings_table(config).settings["text"] == {name: [*shape] for name, shape in SHAPES.items()}
    clip = config.backbone
    encoder = VideoEncoder(clip.pretrained, None, clip.dtype, None, LENGTH, "outside")
    for number, caption in enumerate(CAPTIONS):
        text, expected = cache.read(f"{number}-clip").text, encoder.encode_text([caption])
        assert {name: tuple(value.shape) for name, value in text.items()} == SHAPES
        torch.testing.assert_close(text, {name: value[0] for name, value in expected.items()})
    assert cache.null_text()["prompt_attention_mask"].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_dropped_captions_are_replaced_in_every_tensor(
    dataset: PriorDataset, trained: ProPhyTrainModule, cache: PriorCache
) -> None:
    batches = [dataset[step][0][0] for step in range(8)]
    assert {bool(drop) for batch in batches for drop in batch.drop_caption} == {False, True}
    for batch in batches:
        _, _, text = trained._inputs(batch)
        assert text.keys() == SHAPES.keys()
        for name, value in text.items():
            for row, own, drop in zip(value, batch.text[name], batch.drop_caption, strict=True):
                assert torch.equal(row, cache.null_text()[name] if drop else own)


def test_every_tensor_of_a_text_matters(dataset: PriorDataset, trained: ProPhyTrainModule) -> None:
    [batch], captions = dataset[0]
    noisy, timesteps, text = trained._inputs(batch)
    with torch.no_grad():
        expected = trained.transformer.predict(noisy, timesteps, text)
        for name, value in text.items():
            changed = text | {name: 1 - value}
            assert not torch.equal(
                trained.transformer.predict(noisy, timesteps, changed).sample, expected.sample
            )
        router = trained.transformer.physics_branch.semantic.router
        assert torch.equal(expected.routing.semantic_weights, router(text["prompt_embeds"]))
        routing = trained.transformer.route(noisy, timesteps, text)
        torch.testing.assert_close(routing.phenomenon_maps, expected.routing.phenomenon_maps)
    output = trained(batch, captions)
    assert all(value.isfinite().all() for value in output.values())
    assert output.semantic_alignment is not None and output.token_alignment > 0


def test_what_the_branch_learnt_is_measured_and_sampled(
    config: Config, cache: PriorCache, model: Path
) -> None:
    losses = held_out_losses(config, cache, model)
    assert np.isfinite(losses["loss"]) and losses["token_alignment"] > 0

    sampler, trace = VideoSampler(config.model_copy(update={"checkpoint": str(model)})), PhysicsTrace()
    spec = VideoSpec(
        prompt="a red ball falls",
        negative_prompt="blurred",
        seed=1,
        num_frames=9,
        height=32,
        width=32,
        fps=4.0,
        num_inference_steps=2,
        guidance_scale=3.0,
        physics=PhysicsSpec(),
    )
    frames = sampler.sample(spec, trace=trace)
    assert frames.shape == (9, 32, 32, 3) and trace.phenomenon_maps.shape[1:] == (3, 4, 4, len(PHENOMENA))
    assert np.array_equal(sampler.sample(spec), frames)
    for change in ({"physics": PhysicsSpec(scale=0.0)}, {"prompt": "ice"}, {"negative_prompt": "smoke"}):
        assert not np.array_equal(sampler.sample(spec.model_copy(update=change)), frames), change


def test_its_training_can_be_planned(config: Config) -> None:
    plan = make_plan(config)
    assert plan.num_tokens == 3 * 4 * 4 and plan.flops > 0 and plan.activations[True] > 0


def test_text_encoders_of_another_size_are_refused(config: Config, tmp_path: Path) -> None:
    from tests.backbones.outside_family import OutsideTransformer3DModel, write_pipeline

    folder = write_pipeline(tmp_path / "backbone")
    OutsideTransformer3DModel(pooled_dim=5).save_pretrained(folder / "transformer")
    encoder = VideoEncoder(str(folder), None, "float32", None, LENGTH, "outside")
    with pytest.raises(ProPhyError, match=r"\(6,\).*its transformer reads.*\(5,\).*backbone.pretrained"):
        encoder.encode_text(["ice"])
