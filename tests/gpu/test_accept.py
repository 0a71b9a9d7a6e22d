"""The script of `make gpu`: on a GPU all of it; elsewhere that its quick checks run and pass."""

import pytest

from tests.gpu.accept import CHECKS, main

QUICK = ("experts", "attention", "vlm", "checkpoints")


@pytest.mark.heavy
def test_quick_checks_pass_in_the_form_for_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*QUICK]) == 0
    lines = capsys.readouterr().out
    assert "PASS  map 0 in bfloat16 against the CPU's" in lines
    assert "PASS  gradient of an expert without tokens: 0" in lines and "native's kernel" in lines


def test_a_check_that_breaks_fails_and_the_next_one_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(main.__globals__["CHECKS"], "broken", lambda: 1 / 0)
    assert main(["broken", "experts"]) == 1
    assert "FAIL  broken: ZeroDivisionError" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_other_checks_pass_in_the_form_for_this_machine() -> None:
    assert main([name for name in CHECKS if name not in QUICK]) == 0


@pytest.mark.gpu
def test_all_checks_pass() -> None:
    assert main([]) == 0
