"""What a rank reads ahead, in a process of its own."""

from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

from pipelines.training.data import check_sharing, read_ahead
from prophy.errors import ProPhyError
from prophy.schema import DamagedFileError, MissingFileError
from tests.conftest import tiny_config


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


def test_numbers_that_workers_cannot_share_are_refused_by_one_sentence(tmp_path: Path) -> None:
    def check(*overrides: str) -> None:
        check_sharing(tiny_config(tmp_path, *overrides))

    check("train.num_workers=2", "train.sequence_parallel=2")
    with pytest.raises(ProPhyError, match="'regional', and attention that .* cannot be compiled; set one to"):
        check("train.sequence_parallel=2", "backbone.compile=regional")
    with pytest.raises(ProPhyError, match=r"train.sequence_parallel is 5, .* set it to 1"):
        check("train.num_workers=5", "train.sequence_parallel=5")
    with pytest.raises(ProPhyError, match=r"sequence_parallel \(2\) must divide num_workers \(1\)"):
        check("train.num_workers=1", "train.sequence_parallel=2")
