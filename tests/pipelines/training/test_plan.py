"""What a plan says against DeepSpeed's estimators, and what it advises."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.config import load_config
from pipelines.config.loading import preset_names
from pipelines.training import plan
from pipelines.training.data import shapes_by_clip, sharing_sizes
from pipelines.training.plan import Plan, make_plan
from pipelines.training.states import ModelSize, model_states
from pipelines.training.ways import Way
from prophy.backbones.families import FAMILIES
from prophy.errors import ProPhyError
from tests.outside import plugged_in

NUM_PARAMETERS, GPUS = 1_600_000_000, 8
# DeepSpeed's estimators know models that are trained as a whole, in 16 bit.
ALL_TRAINED = ModelSize(NUM_PARAMETERS, 0, NUM_PARAMETERS, trained_bytes=2, frozen_bytes=0)


def without_buffers(zero_stage: int, offload: str) -> tuple[int, int]:
    states = model_states(ALL_TRAINED, GPUS, zero_stage, offload)
    return states.host, states.total - states.buffers


@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_zero2_agrees_with_deepspeed(offload: str) -> None:
    host, gpu = estimate_zero2_model_states_mem_needs(NUM_PARAMETERS, GPUS, 1, offload != "none", 1.0)
    assert without_buffers(2, offload)[1] == gpu
    if offload == "optimizer":
        # DeepSpeed: at least the 4 bytes of each rank's own copy while it loads, 32 for 8 of them.
        assert without_buffers(2, offload)[0] == 16 * NUM_PARAMETERS <= host


@pytest.mark.parametrize("offload", ["none", "optimizer", "all"])
def test_zero3_agrees_with_deepspeed(offload: str) -> None:
    on_cpu = (offload != "none", offload == "all")
    host, gpu, _ = estimate_zero3_model_states_mem_needs(NUM_PARAMETERS, 0, GPUS, 1, *on_cpu, True, 1.0)
    assert without_buffers(3, offload) == (host, gpu)


def test_what_is_frozen_has_neither_gradient_nor_optimizer() -> None:
    """Beside what is trained there is one copy in its precision; ZeRO 3 shares that out too."""
    frozen = ModelSize(10, 4, trained=4, trained_bytes=4, frozen_bytes=1000)
    assert model_states(frozen, 1, 0, "none").total == 1000 + 4 * (4 + 4 + 8)
    two = model_states(frozen, 2, 2, "none")
    assert (two.weights, two.gradients, two.optimizer) == (1016, 16, 24)
    assert model_states(frozen, 2, 3, "none").weights == 508


@pytest.fixture(scope="module")
def wan_14b() -> Plan:
    return make_plan(load_config("wan2.1-14b", [f"train.num_workers={GPUS}"]))


@pytest.mark.heavy
def test_plan_of_a_published_model(wan_14b: Plan) -> None:
    assert wan_14b.size.backbone == 14_288_491_584
    assert wan_14b.size.trained == wan_14b.size.branch
    assert wan_14b.num_tokens == 21 * 30 * 52
    # Forward: two operations per parameter and token, and attention; 3 for the branch, 2 for the backbone.
    attention = 4 * wan_14b.num_tokens**2 * 5120 * 40
    per_sample = 4 * wan_14b.size.backbone * wan_14b.num_tokens + 3 * attention
    assert 1.0 < wan_14b.flops / 32 / per_sample < 1.4
    assert wan_14b.activations[True] < wan_14b.activations[False] / 5


@pytest.mark.heavy
def test_plan_of_what_is_beside_training(wan_14b: Plan) -> None:
    """Wan's VAE against a count of a whole clip: 6.0 GB to encode, 8.2 to decode, 162 TFLOP to encode."""
    parts = wan_14b.footprint
    assert parts.vae.encode == pytest.approx(6.0e9, rel=0.02)
    assert parts.vae.decode == pytest.approx(8.2e9, rel=0.02)
    assert parts.vae.encode_flops == pytest.approx(162e12, rel=0.02)
    assert parts.text_encoder == pytest.approx(11.4e9, rel=0.01)
    assert parts.encoding == parts.text_encoder + parts.vae.weights + parts.vae.encode
    assert 55e9 < parts.serving < 62e9
    assert 0.3 < wan_14b.recomputed_flops / wan_14b.flops < 0.4


@pytest.mark.slow
def test_gpus_that_share_a_video_share_what_a_step_takes() -> None:
    alone, shared = (
        make_plan(load_config("tiny", [f"serve.sequence_parallel={number}"])).footprint for number in (1, 2)
    )
    assert shared.denoising == alone.denoising // 2 > 0
    assert shared.transformers == alone.transformers and shared.vae == alone.vae
    guided, apart = (
        make_plan(load_config("cogvideox-2b", [f"serve.cfg_parallel={value}"])).footprint
        for value in ("false", "true")
    )
    assert apart.denoising == guided.denoising // 2 and apart.processes_per_replica == 2


@pytest.mark.slow
def test_attention_that_is_kept_is_not_computed_again(wan_14b: Plan) -> None:
    """An output of 32,760 x 5,120 in each of 40 + 9 blocks."""
    overrides = [f"train.num_workers={GPUS}", "train.keep_attention=true"]
    kept = make_plan(load_config("wan2.1-14b", overrides))
    assert kept.activations[True] - wan_14b.activations[True] == pytest.approx(49 * 0.34e9, rel=0.01)
    assert kept.activations[False] == wan_14b.activations[False]
    assert 0.4 < kept.recomputed_flops / wan_14b.recomputed_flops < 0.6


def test_moving_averages_take_memory_where_the_optimizer_does() -> None:
    size = ModelSize(10, 4, trained=8, trained_bytes=4, frozen_bytes=1000)
    for stage, offload, share in ((0, "none", 32), (1, "none", 16), (3, "none", 16), (2, "optimizer", 0)):
        without, averaged = (model_states(size, 2, stage, offload, averages) for averages in (False, True))
        assert averaged.total - without.total == share
        assert averaged.host - without.host == (0 if share else 32)


@pytest.mark.heavy
def test_load_balancing_routes_all_but_the_first_micro_batch_ahead(wan_14b: Plan) -> None:
    assert wan_14b.train.gradient_accumulation_steps == 4
    assert 0.04 < wan_14b.routing_flops / wan_14b.flops < 0.06
    assert make_plan(load_config("tiny", ["train.num_workers=1"])).routing_flops > 0
    assert make_plan(load_config("tiny", ["train.num_workers=2"])).routing_flops == 0
    overrides = ["train.num_workers=1", "physics.num_refinement_experts=0", "train.start_from=null"]
    assert make_plan(load_config("tiny", overrides)).routing_flops == 0


@pytest.mark.heavy
def test_advice_is_the_first_way_that_fits(wan_14b: Plan) -> None:
    assert wan_14b.advice(1e12) == Way(1, "none", gradient_checkpointing=False)
    assert wan_14b.advice(141e9) == Way(1, "none", gradient_checkpointing=True)
    assert wan_14b.total(Way(2, "none", True)) > 0.9 * 80e9 > wan_14b.total(Way(3, "none", True))
    assert wan_14b.advice(80e9) == Way(3, "none", gradient_checkpointing=True)
    assert wan_14b.advice(1e9) is None


@pytest.mark.heavy
def test_gpus_share_samples_where_nothing_fits_alone(wan_14b: Plan) -> None:
    """Before anything goes to the host. 40 heads and 32,760 tokens make 2, 4 and 8 of 8 GPUs."""
    assert wan_14b.sharing_sizes == [1, 2, 4, 8]
    way = wan_14b.advice(48e9)
    assert way == Way(3, "none", gradient_checkpointing=True, sequence_parallel=2)
    assert "--set train.sequence_parallel=2" in way.overrides(wan_14b.train)
    halved = wan_14b.total(Way(3, "none", True)) - wan_14b.total(way)
    assert halved == pytest.approx((wan_14b.activations[True] - 2 * wan_14b.size.trained) / 2)
    # Queries, keys, values and output of 49 blocks, thrice: half of each half goes, in 8 micro-batches.
    assert wan_14b.exchanged(way) == 49 * 32760 * 5120 * 2 * 4 * 3 * 8 // 4
    with pytest.raises(ProPhyError, match="so many workers cannot share out 40 attention heads; set it to 1"):
        make_plan(load_config("wan2.1-14b", ["train.num_workers=3", "train.sequence_parallel=3"]))


@pytest.mark.heavy
def test_advice_is_taken_by_the_configuration() -> None:
    """Whatever else it says: attention that is kept needs checkpoints, fewest workers whole groups."""
    plan = make_plan(load_config("tiny", ["train.num_workers=2"]))
    overrides = ["train.gradient_checkpointing=true", "train.keep_attention=true"]
    keeping = replace(plan, train=load_config("tiny", ["train.num_workers=2", *overrides]).train)
    way = keeping.advice(1e12)
    assert way is not None and not way.gradient_checkpointing
    advised = way.overrides(keeping.train).removeprefix("--set ").split(" --set ")
    assert "train.keep_attention=false" in advised
    load_config("tiny", ["train.num_workers=2", *overrides, *advised])

    assert plan.sharing_sizes == [1, 2]
    shared = Way(2, "none", True, sequence_parallel=2)
    assert shared.fits(plan.train)
    elastic = load_config("tiny", ["train.num_workers=2", "train.min_workers=1"]).train
    assert not shared.fits(elastic) and replace(shared, sequence_parallel=1).fits(elastic)
    in_8_bits = load_config("tiny", ["train.num_workers=2", "train.storage_dtype=float8_e4m3fn"]).train
    assert not Way(3, "none", True).fits(in_8_bits)
    compiled = make_plan(load_config("tiny", ["train.num_workers=2", "backbone.compile=regional"]))
    assert compiled.sharing_sizes == [1]


@pytest.mark.heavy
def test_a_plan_is_of_the_shapes_that_train() -> None:
    """Height and width are what a video is served in; clips are of the buckets."""
    usual = make_plan(load_config("tiny"))
    wide = make_plan(load_config("tiny", ["backbone.aspect_buckets=[[64,64],[64,96]]"]))
    assert usual.clip[1:] == (64, 64) and wide.clip[1:] == (64, 96)
    assert wide.num_tokens == 1.5 * usual.num_tokens
    assert wide.footprint.vae.encode > usual.footprint.vae.encode
    assert wide.footprint.vae.decode == usual.footprint.vae.decode
    assert wide.footprint.denoising == pytest.approx(usual.footprint.denoising, rel=0.1)
    odd = ["backbone.aspect_buckets=[[64,64],[56,72]]", "train.sequence_parallel=2"]
    with pytest.raises(
        ProPhyError,
        match="315 tokens of a clip of 17 frames of 56x72; set it to 1, or change 56x72 in backbone.a",
    ):
        make_plan(load_config("tiny", odd))


PRESETS = sorted(set(preset_names()) - {"tiny"})


@pytest.mark.parametrize("preset", PRESETS)
def test_gpus_can_share_every_shape_of_a_preset(preset: str) -> None:
    """2, 4 and 8 of them; what has 12 heads goes to 4, and CogVideoX, whose text has 226 tokens, to 2."""
    most = 4 if preset == "wan2.1-1.3b" else 2 if preset.startswith("cogvideox") else 8
    config = load_config(preset, ["train.num_workers=8"])
    family = FAMILIES[config.backbone.family]
    published = family.published[config.backbone.pretrained]
    with torch.device("meta"):
        transformer = family.classes().transformer(**{**published.transformer, "num_layers": 1}).config
    shapes = shapes_by_clip(config, published.vae, transformer)
    assert sharing_sizes(config, transformer, shapes) == [size for size in (1, 2, 4, 8) if size <= most]


@pytest.mark.slow
def test_eight_bits_take_less_and_leave_out_zero_3() -> None:
    without, stored = (
        make_plan(load_config("tiny", ["train.num_workers=2", *extra]))
        for extra in ([], ["train.storage_dtype=float8_e4m3fn"])
    )
    saved = without.states(1, "none").weights - stored.states(1, "none").weights
    assert 0.4 < saved / without.size.frozen_bytes < 0.8, "of float32, or of bfloat16"
    assert stored.size.trained == without.size.trained
    assert [*stored.zero_stages] == [0, 1, 2] and 3 in without.zero_stages


def test_text_that_goes_through_the_blocks_is_shared_out_too() -> None:
    family = FAMILIES["cogvideox"]
    config = {"num_attention_heads": 48}
    assert family.unshareable(2, 17550, 226, config) is None
    assert "226 tokens of text" in str(family.unshareable(4, 17552, 226, config))
    assert "17550 tokens of a clip" in str(family.unshareable(4, 17550, 224, config))


@pytest.mark.heavy
def test_command_prints_a_table() -> None:
    options = ["--config", "wan2.1-1.3b", "--gpus", "8", "--gpu-memory", "80", "--price", "2.5"]
    result = CliRunner().invoke(app, ["plan", *options])
    assert result.exit_code == 0
    assert "1.419B" in result.output and "advice: --set train.zero_stage=1" in result.output
    assert "GPU hours, " in result.output and "at 2.5 an hour" in result.output
    assert "serving takes" in result.output and "the VLM of 33.453B" in result.output
    # 0.58 s of products, and 256 steps that read 64 GB of weights for 4 clips, and 0.44 GB for each.
    assert "1,000 clips, 4 at once, take 0.745 GPU hours, 1.86 at 2.5 an hour" in " ".join(
        result.output.split()
    )


@pytest.mark.heavy
def test_vlm_of_two_gpus_takes_both_all_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["vlm.device_map=auto", "cache.extract.num_gpus=2"]
    plan.run(load_config("wan2.1-1.3b", overrides), 80)
    assert "4 at once, take 1.49 GPU hours," in " ".join(capsys.readouterr().out.split())


def test_vlm_of_another_package_is_said_to_be_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "outside_vlm"}))
    with plugged_in(tmp_path, "prophy.vlms", "outside_vlm", "tests.priors.outside_vlm:OutsideVlm"):
        plan.run(load_config("tiny", [f"vlm.pretrained={tmp_path}"]), 80)
    told = "".join(capsys.readouterr().out.split())
    assert f"whattheVLMin{tmp_path}takesisnotknown" in told


def test_unknown_model_without_network() -> None:
    with pytest.raises(ProPhyError, match="cannot load nobody/nothing: no complete model of this name"):
        make_plan(load_config("wan2.1-14b", ["backbone.pretrained=nobody/nothing"]))
