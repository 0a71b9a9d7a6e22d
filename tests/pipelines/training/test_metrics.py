"""What the clock of a step says."""

import time

from pipelines.training.metrics import StepClock


def test_a_clock_adds_up_phases_until_it_is_read() -> None:
    clock = StepClock()
    for item in clock.waiting_for([1, 2]):
        with clock("forward"):
            time.sleep(0.01 * item)
    seconds = clock.read()
    assert seconds.keys() == {"data", "forward"} and seconds["forward"] >= 0.03
    assert clock.read() == {}
