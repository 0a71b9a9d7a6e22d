from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from prophy.errors import ProPhyError
from prophy.pretraining import recipe
from prophy.pretraining.recipe import fit, held_out_clips, made_from, training_clips, trapezoid


def train(
    checkpoint: Path, num_steps: int, cut_off_at: int | None = None, vae: str = "a"
) -> tuple[torch.Tensor, int]:
    """A line fitted by AdamW on draws that depend on the step alone: its weight, and how many steps."""
    torch.manual_seed(0)
    line = torch.nn.Linear(3, 1)
    optimiser = torch.optim.AdamW(line.parameters(), lr=0.1)

    def take_step(step: int) -> dict[str, float]:
        if step == cut_off_at:
            raise KeyboardInterrupt
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        loss = ((line(inputs) - inputs.sum(1, keepdim=True)) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return {"loss": loss.item()}

    progress = fit(take_step, {"line": line, "optimiser": optimiser}, checkpoint, num_steps, {"VAE": vae})
    return line.weight.detach().clone(), len(progress.history)


def test_cut_off_and_started_again_equals_running_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    expected, _ = train(tmp_path / "whole.pt", 7)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut.pt", 7, cut_off_at=4)
    actual, num_steps = train(tmp_path / "cut.pt", 7)
    assert torch.equal(actual, expected)
    assert num_steps == 7


def test_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    expected, _ = train(tmp_path / "whole.pt", 3)
    actual, _ = train(tmp_path / "whole.pt", 3, cut_off_at=0)
    assert torch.equal(actual, expected)


def test_training_does_not_go_on_with_what_it_did_not_begin_with(tmp_path: Path) -> None:
    train(tmp_path / "whole.pt", 2)
    with pytest.raises(ProPhyError, match="whole.pt was trained with another VAE .*; choose another run_dir"):
        train(tmp_path / "whole.pt", 3, vae="b")
    _, num_steps = train(tmp_path / "whole.pt", 3)
    assert num_steps == 3


def test_clips_of_another_sandbox_are_simulated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training_clips(tmp_path, 1, seed=3)
    written = (tmp_path / "parts.json").stat().st_mtime_ns
    monkeypatch.setattr(recipe, "simulator", lambda: {"sandbox": "changed"})
    training_clips(tmp_path, 1, seed=3)
    assert (tmp_path / "parts.json").stat().st_mtime_ns > written


def test_what_was_made_from_something_else_is_removed(tmp_path: Path) -> None:
    made_from(tmp_path, {"VAE": "a"})
    (tmp_path / "000000.safetensors").touch()
    made_from(tmp_path, {"VAE": "a"})
    assert (tmp_path / "000000.safetensors").exists()
    made_from(tmp_path, {"VAE": "b"})
    assert [file.name for file in tmp_path.iterdir()] == [recipe.MADE_FROM]


def test_learning_rate_rises_stays_and_falls_to_zero() -> None:
    factors = [trapezoid(step, 100, warmup_steps=10, decay_share=0.5) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:50] == [1.0] * 41
    assert factors[-1] == pytest.approx(0.02)
    assert all(later < earlier for earlier, later in pairwise(factors[50:]))


def test_clips_are_simulated_once(tmp_path: Path) -> None:
    first = training_clips(tmp_path, 2, seed=3)
    written = (tmp_path / "parts.json").stat().st_mtime_ns
    again = training_clips(tmp_path, 2, seed=3)
    assert (tmp_path / "parts.json").stat().st_mtime_ns == written
    assert np.array_equal(first.frames, again.frames)
    assert first.masks.any(axis=(1, 2, 3)).all()
    assert first.parts == again.parts
    assert not np.array_equal(first.frames[0], held_out_clips(1)[0].frames)
