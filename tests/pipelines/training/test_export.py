"""What export writes from fragments is what was trained: as a branch, and as a complete pipeline."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.config import Config
from pipelines.evaluation import contestants
from pipelines.layout import RunFolder
from pipelines.runtime import open_run
from pipelines.training import export, train
from pipelines.training.checkpoint_places import FolderStore, open_checkpoints
from pipelines.training.plan import make_plan
from pipelines.training.saving import Fragment, Save
from prophy.backbones.loading import load_pipeline
from prophy.backbones.pretrained import fingerprint, resolve_pretrained
from prophy.errors import ProPhyError
from prophy.generation.pipeline_wan import ProPhyWanPipeline
from prophy.models.checkpoint import load_branch, lora_config
from prophy.models.stored import local_folder
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
from tests.backbones.small_training import one_rank
from tests.conftest import tiny_config
from tests.object_store import object_store

PARTS = {"vae": None, "text_encoder": None, "tokenizer": None}


def test_the_branch_alone(trained: Config, transformer: ProPhyWanTransformer3DModel, tmp_path: Path) -> None:
    own = transformer.physics_branch.state_dict()
    expected = {f"physics_branch.{name}": value for name, value in own.items()}
    for step, factor in ((7, 1), (None, 2)):
        branch = load_branch(export.run(trained, tmp_path / str(step), step, complete=False))
        assert branch.physics["physics_layers"] == [0, 4]
        assert branch.state_dict.keys() == expected.keys()
        assert all(torch.equal(branch.state_dict[name], factor * value) for name, value in expected.items())
    load_pipeline("wan", "tiny", None, torch.float32, tmp_path / "7", **PARTS)


def test_a_complete_pipeline(
    trained: Config, transformer: ProPhyWanTransformer3DModel, tmp_path: Path
) -> None:
    folder = export.run(trained, tmp_path / "pipeline", 7, complete=True)
    pipeline = ProPhyWanPipeline.from_pretrained(folder)
    assert isinstance(pipeline.transformer, ProPhyWanTransformer3DModel)
    assert pipeline.config.max_sequence_length == 32
    weights, expected = pipeline.transformer.state_dict(), transformer.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    card = (folder / "README.md").read_text()
    assert "Trained for 7 steps" in card and "ProPhyWanPipeline.from_pretrained" in card


@pytest.mark.parametrize("use", [train.run, make_plan])
def test_a_complete_pipeline_is_no_backbone_to_train(
    trained: Config, tmp_path: Path, use: Callable[[Config], object]
) -> None:
    folder = export.run(trained, tmp_path / "pipeline", 7, complete=True)
    config = tiny_config(tmp_path / "next", f"backbone.pretrained={folder}")
    with pytest.raises(
        ProPhyError, match=r"pipeline is a complete export, which holds a trained branch; set"
    ):
        use(config)


@pytest.mark.parametrize("how", ["lora", "full"])
def test_a_complete_pipeline_holds_what_was_trained_of_a_bfloat16_backbone(how: str, tmp_path: Path) -> None:
    """An adapter stays beside the weights, which are those of before; trained weights are float32."""
    backbone = shutil.copytree(resolve_pretrained("tiny"), tmp_path / "backbone")
    [file] = (backbone / "transformer").glob("*.safetensors")
    original = {name: value.bfloat16() for name, value in load_file(file).items()}
    save_file(original, file, {"format": "pt"})
    config = tiny_config(tmp_path / "run", f"backbone.pretrained={backbone}")
    dtype = torch.bfloat16 if how == "lora" else torch.float32
    model = ProPhyWanTransformer3DModel.from_transformer(
        load_pipeline("wan", str(backbone), None, dtype, None, **PARTS).transformer,
        {"physics_layers": [0], "latent_shape": [5, 16, 16], "phenomena": ["melting"]},
    )
    model.physics_branch.float()
    if how == "lora":
        model.add_lora(rank=8, alpha=4)
    model.train_backbone(how)
    torch.manual_seed(0)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for value in trained.values():
        value.data += 1e-4 * torch.randn_like(value)  # less than bfloat16 tells apart
    parts = [
        Fragment(f"transformer.{name}", 0, {"parameter": value.detach().flatten()})
        for name, value in trained.items()
    ]
    shapes = {f"transformer.{name}": value.shape for name, value in trained.items()}
    pin = {"name": str(backbone), "revision": None, "fingerprint": fingerprint(str(backbone), None)}
    run = {"backbone": pin, "physics": model.config["physics"], "lora": lora_config(model)}
    with one_rank():
        Save(FolderStore(config.checkpoints), 1, parts, shapes, run).commit(num_to_keep=1)

    folder = export.run(config, tmp_path / "pipeline", None, complete=True)
    card = (folder / "README.md").read_text()
    assert ("rank 8 and alpha 4, which is not fused" if how == "lora" else "are float32") in card
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = ProPhyWanPipeline.from_pretrained(folder, torch_dtype=dtype)
        loaded = pipeline.transformer.state_dict()
        assert loaded.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(loaded[name], value.to(loaded[name].dtype)), name


def test_the_best_checkpoint(trained: Config, tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match=r"measured on held-out clips, and kept; set train\.num_held_out"):
        export.run(trained, tmp_path / "best", "best", complete=False)
    FolderStore(trained.checkpoints).pin(best=7)
    try:
        best = load_branch(export.run(trained, tmp_path / "best", "best", complete=False))
    finally:
        FolderStore(trained.checkpoints).pin()
    expected = load_branch(export.run(trained, tmp_path / "7", 7, complete=False))
    assert all(torch.equal(value, expected.state_dict[name]) for name, value in best.state_dict.items())


def test_checkpoints_in_s3(trained: Config, tmp_path: Path) -> None:
    """Whether a configuration names them, or the run folder alone knows where they are."""
    url = "s3://bucket/checkpoints"
    with object_store() as store:
        store.mkdir("bucket")
        store.put(f"{trained.checkpoints}/", "bucket/checkpoints/", recursive=True)
        named = tiny_config(tmp_path / "elsewhere", f"train.checkpoints={url}")
        known = tiny_config(tmp_path / "run")
        open_run(tiny_config(known.run_dir, f"train.checkpoints={url}"), "train")
        open_checkpoints(url).pin(best=7)
        for step in (7, None, "best"):
            expected = export.run(trained, tmp_path / f"{step}", 7 if step == "best" else step, False)
            for config in (named, known):
                folder = export.run(config, tmp_path / f"{config.run_dir.name}-{step}", step, False)
                for file in expected.iterdir():
                    assert (folder / file.name).read_bytes() == file.read_bytes()
        with pytest.raises(ProPhyError, match=f"no undamaged checkpoint of step 3 in {url}; run `prophy tr"):
            export.run(known, tmp_path / "out", 3, complete=False)
        with pytest.raises(
            ProPhyError, match=r"train\.checkpoints is 's3://bucket/checkpoints' there and None"
        ):
            open_run(known, "train")
        with pytest.raises(ProPhyError, match="no whole model lies at s3://bucket/checkpoints/step-00000008"):
            load_branch(local_folder(f"{url}/step-00000008"))
        RunFolder(known.run_dir).training.mkdir()
        from_run = contestants._model_of(known.run_dir, tmp_path / "compared")
        assert load_branch(from_run).physics["physics_layers"] == [0, 4]


def test_mistakes(trained: Config, tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="no checkpoint in .*run `prophy train`"):
        export.run(tiny_config(tmp_path / "none"), tmp_path / "out", None, complete=False)
    with pytest.raises(ProPhyError, match="no undamaged checkpoint of step 3"):
        export.run(trained, tmp_path / "out", 3, complete=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ProPhyError, match="full exists; choose another folder"):
        export.run(trained, tmp_path / "full", 7, complete=False)
    beside = tmp_path / "full" / "file" / "out"
    with pytest.raises(ProPhyError, match=f"cannot export to {beside}: .*; mend that"):
        export.run(trained, beside, 7, complete=False)


@pytest.mark.parametrize("complete", [False, True])
def test_an_export_that_was_killed_is_made_again(trained: Config, tmp_path: Path, complete: bool) -> None:
    once = export.run(trained, tmp_path / "once", 7, complete)
    left = tmp_path / "out.partial" / "transformer" / "half.safetensors"
    left.parent.mkdir(parents=True)
    left.touch()
    out = export.run(trained, tmp_path / "out", 7, complete)
    assert {path.name for path in tmp_path.iterdir()} == {"once", "out"}
    files, expected = (
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (out, once)
    )
    assert files == expected


def test_an_export_that_fails_leaves_nothing(
    trained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "_write_json", full)
    with pytest.raises(ProPhyError, match="No space left on device; mend that"):
        export.run(trained, tmp_path / "out", 7, complete=True)
    assert not any(tmp_path.iterdir())
