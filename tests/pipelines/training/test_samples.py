"""Which samples are held out: a function of their names alone."""

import pyarrow as pa

from pipelines.training.samples import held_out


def test_what_was_trained_on_is_never_held_out_later() -> None:
    """Clips of one video stay together; whatever joins the cache, only new videos are held out."""
    before = ["b-0-1", "b-1-2", "d-0-1", "e-0-1"]
    assert held_out(pa.array(before), 1).to_pylist() == ["b-0-1", "b-1-2"]
    for new in ("a-0-1", "c-0-1", "f-0-1"):
        later = pa.array([*before, new])
        assert {*held_out(later, 1).to_pylist()} <= {"b-0-1", "b-1-2", new}
        assert "e-0-1" not in held_out(later, 2).to_pylist()
    assert len(held_out(pa.array(before), 0)) == 0
