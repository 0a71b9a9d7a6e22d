"""What a rank reads ahead, in a process of its own."""

from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

from pipelines.training.data import read_ahead
from prophy.errors import ProPhyError
from prophy.schema import DamagedFileError, MissingFileError


class Spoilt(Dataset[Any]):
    """Steps are told by their numbers; from 5 on they cannot be read."""

    def __init__(self, error: ProPhyError) -> None:
        self.error = error

    def __getitem__(self, step: int) -> Any:
        if step >= 5:
            raise self.error
        return f"step {step}"


@pytest.mark.parametrize(
    "error",
    [
        ProPhyError("the sample of step 5 is of no use; do this"),
        MissingFileError("a.parquet is gone; do that"),
        DamagedFileError(Path("a.parquet"), "is damaged"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_mistake_comes_out_of_the_process_that_reads_as_one_sentence(error: ProPhyError) -> None:
    steps = read_ahead(Spoilt(error), range(3, 7))
    assert [next(steps), next(steps)] == ["step 3", "step 4"]
    with pytest.raises(type(error)) as caught:
        next(steps)
    assert str(caught.value) == str(error)
