"""`prophy pretrain bundle`: what is put where the product looks for it."""

from pathlib import Path

import pytest

from pipelines.layout import RunFolder
from pipelines.sandbox import pretrain
from prophy.errors import ProPhyError
from tests.conftest import tiny_config


def test_nothing_trained_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="nothing was trained"):
        pretrain.run(tiny_config(tmp_path), "bundle")


@pytest.mark.parametrize(("part", "missing"), [("text_encoder", "backbone"), ("transformer", "text_encoder")])
def test_text_encoder_and_transformer_are_bundled_together(part: str, missing: str, tmp_path: Path) -> None:
    (RunFolder(tmp_path).pretrained / part).mkdir(parents=True)
    with pytest.raises(ProPhyError, match=f"belong together.*run `prophy pretrain {missing}`"):
        pretrain.run(tiny_config(tmp_path), "bundle")
