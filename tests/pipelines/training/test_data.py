"""What a rank reads ahead, in a process of its own."""

from typing import Any

import pytest
from torch.utils.data import Dataset

from pipelines.training.data import read_ahead
from prophy.errors import ProPhyError


class Spoilt(Dataset[Any]):
    """Steps are told by their numbers; from 5 on they cannot be read."""

    def __getitem__(self, step: int) -> Any:
        if step >= 5:
            raise ProPhyError(f"the sample of step {step} is damaged; do this")
        return f"step {step}"


def test_a_mistake_comes_out_of_the_process_that_reads_as_one_sentence() -> None:
    steps = read_ahead(Spoilt(), range(3, 7))
    assert [next(steps), next(steps)] == ["step 3", "step 4"]
    with pytest.raises(ProPhyError, match=r"^the sample of step 5 is damaged; do this$"):
        next(steps)
