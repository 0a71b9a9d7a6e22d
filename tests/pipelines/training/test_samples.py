"""Which samples are held out: a function of their names alone."""

from pipelines.training.samples import held_out


def test_what_was_trained_on_is_never_held_out_later() -> None:
    """Clips of one video stay together; whatever joins the cache, only new videos are held out."""
    before = ["b-0-1", "b-1-2", "d-0-1", "e-0-1"]
    assert held_out(before, 1) == {"b-0-1", "b-1-2"}
    for new in ("a-0-1", "c-0-1", "f-0-1"):
        assert held_out([*before, new], 1) <= {"b-0-1", "b-1-2", new}
        assert not held_out([*before, new], 2) & {"e-0-1"}
