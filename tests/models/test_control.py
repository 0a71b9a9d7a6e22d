import pytest
import torch

from prophy.errors import ProPhyError
from prophy.models.control import PhysicsControl, PhysicsTrace, RoutingOutput
from tests.wisa import PHENOMENA


def routing(value: float) -> RoutingOutput:
    maps = torch.arange(12.0).view(1, 12, 1).expand(1, 12, 17) + value
    return RoutingOutput(torch.full((1, 3), value), torch.zeros(1, 12, 4), maps)


def test_trace_means_over_conditional_passes() -> None:
    trace = PhysicsTrace()
    for timestep, conditional, unconditional in ((900.0, 1.0, 50.0), (500.0, 3.0, 60.0), (100.0, 8.0, 70.0)):
        trace.record(timestep, routing(conditional), (1, 3, 4), PHENOMENA)
        trace.record(timestep, routing(unconditional), (1, 3, 4), PHENOMENA)
    assert trace.num_passes == 3 and trace.phenomena == PHENOMENA
    torch.testing.assert_close(trace.semantic_weights, torch.full((1, 3), 4.0))
    torch.testing.assert_close(trace.phenomenon_maps[0, 0, 1, 2], torch.full((17,), 6.0 + 4.0))


def test_token_gain_is_the_weighted_strength() -> None:
    maps = torch.rand(2, 5, 17)
    strength = {"collision": 0.0, "combustion": 3.0}
    gain = PhysicsControl(strength=strength).token_gain(maps, PHENOMENA)
    for video in range(2):
        for token in range(5):
            weights = maps[video, token] / maps[video, token].sum()
            expected = sum(w * strength.get(p, 1.0) for w, p in zip(weights, PHENOMENA, strict=True))
            torch.testing.assert_close(gain[video, token, 0], expected)


def test_strength_one_is_the_identity() -> None:
    gain = PhysicsControl(strength=dict.fromkeys(PHENOMENA, 1.0)).token_gain(torch.rand(2, 5, 17), PHENOMENA)
    assert torch.equal(gain, torch.ones(2, 5, 1))


def test_a_strength_of_no_phenomenon_of_the_branch_is_refused() -> None:
    control = PhysicsControl(strength={"colision": 2.0})
    with pytest.raises(ProPhyError, match="unknown phenomenon 'colision'; did you mean 'collision'?"):
        control.token_gain(torch.rand(1, 2, 17), PHENOMENA)


def test_a_strength_counts_where_the_branch_has_its_name() -> None:
    """The order is the branch's, whatever taxonomy there is beside it."""
    maps = torch.rand(1, 5, 3)
    names = ("combustion", "boiling", "collision")
    gain = PhysicsControl(strength={"collision": 3.0}).token_gain(maps, names)
    weights = maps / maps.sum(-1, keepdim=True)
    torch.testing.assert_close(gain, 1 + 2 * weights[..., 2:])
