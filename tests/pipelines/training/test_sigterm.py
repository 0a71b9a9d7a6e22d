"""What SIGTERM does to the command that trains: no workers here, but the files that they write."""

import logging
import os
import signal
from pathlib import Path

import pytest

from pipelines.layout import BEGUN_FILE, STOP_FILE
from pipelines.training.train import alone, obeying_sigterm


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def _told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_before_the_first_step_it_ends_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    previous = signal.getsignal(signal.SIGTERM)
    (tmp_path / BEGUN_FILE).touch()  # of a command that was killed
    with pytest.raises(SystemExit) as left, alone(tmp_path), obeying_sigterm(tmp_path / STOP_FILE):
        terminate()
        pytest.fail("it went on")
    assert left.value.code == 143
    assert "ends at once" in caplog.text
    assert signal.getsignal(signal.SIGTERM) == previous
    with alone(tmp_path):  # the folder is free
        pass


def test_a_step_at_work_is_waited_for_until_it_comes_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop, waited = tmp_path / STOP_FILE, False
    with pytest.raises(SystemExit) as left, obeying_sigterm(stop):
        (tmp_path / BEGUN_FILE).touch()
        terminate()
        waited = stop.exists()
        assert "waits until the workers have ended the step at work" in caplog.text
        terminate()
        pytest.fail("it went on")
    assert waited and left.value.code == 143


def test_an_interrupt_of_the_user_stays_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), obeying_sigterm(tmp_path / STOP_FILE):
        raise KeyboardInterrupt
