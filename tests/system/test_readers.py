"""The cache in the hands of people who do not have this project: pyarrow, DuckDB, Hugging Face datasets."""

from pathlib import Path

import datasets
import duckdb
import numpy as np
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.config import Config
from prophy.schema import EMPTY_PROMPT, ROW_FILES, text_column
from prophy.training.cache import PriorCache
from tests.caches import encodings_folder, priors_folder


@pytest.fixture(scope="module")
def folders(tiny_cache: Config) -> tuple[Path, Path]:
    return priors_folder(tiny_cache), encodings_folder(tiny_cache)


def assert_same_text(row: dict, expected: dict[str, torch.Tensor]) -> None:
    """Read as the schema documents it, with numpy alone."""
    text = {x["name"]: np.frombuffer(x["data"], x["dtype"]).reshape(x["shape"]) for x in row["text"]}
    assert text.keys() == expected.keys() == {"prompt_embeds"}
    assert all(np.array_equal(text[name], value.numpy()) for name, value in expected.items())


def assert_is_the_cache(
    priors: dict[str, dict], encodings: dict[str, dict], folders: tuple[Path, Path]
) -> None:
    """The rows against what training reads."""
    ours = PriorCache(*folders)
    assert priors.keys() == encodings.keys() == {*ours.sample_ids.to_pylist()}
    for sample_id in priors:
        sample = ours.read(sample_id)
        maps = np.float32(priors[sample_id]["maps"]).reshape(priors[sample_id]["maps_shape"])
        assert np.array_equal(maps, sample.maps.numpy())
        assert list(priors[sample_id]["map_phenomena"]) == sample.map_phenomena
        assert np.array_equal(np.float32(priors[sample_id]["phenomena"]), sample.phenomena.numpy())
        row = encodings[sample_id]
        latents = np.frombuffer(row["latents"], row["latents_dtype"]).reshape(row["latents_shape"])
        assert np.array_equal(latents, sample.latents.numpy())
        assert_same_text(row, sample.text)


def test_pyarrow(folders: tuple[Path, Path]) -> None:
    tables = [
        pads.dataset([str(file) for file in folder.glob(ROW_FILES)]).to_table().to_pylist()
        for folder in folders
    ]
    priors, encodings = ({row["sample_id"]: row for row in rows} for rows in tables)
    assert_is_the_cache(priors, encodings, folders)
    [empty] = pq.read_table(folders[1] / EMPTY_PROMPT).to_pylist()
    assert_same_text(empty, PriorCache(*folders).null_text())


def test_duckdb(folders: tuple[Path, Path]) -> None:
    priors, encodings = (f"read_parquet('{folder}/{ROW_FILES}')" for folder in folders)
    query = f"SELECT * EXCLUDE (source, caption) FROM {priors} p JOIN {encodings} e USING (sample_id)"
    columns = duckdb.sql(query).to_arrow_table().to_pylist()
    joined = {row["sample_id"]: row for row in columns}
    assert_is_the_cache(joined, joined, folders)
    [(answers, videos)] = duckdb.sql(
        f"SELECT count(*) FILTER (answers[1].question = 'caption'), count(DISTINCT source.uri) FROM {priors}"
    ).fetchall()
    assert answers == videos == 12


def test_hugging_face_datasets(folders: tuple[Path, Path], tmp_path: Path) -> None:
    tables = []
    for folder in folders:
        files = f"{folder}/{ROW_FILES}"
        loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
        tables.append({row["sample_id"]: row for row in loaded})
    priors, encodings = tables
    assert_is_the_cache(priors, encodings, folders)


def test_bfloat16_has_its_bytes(folders: tuple[Path, Path]) -> None:
    """numpy has no bfloat16: its bytes are the upper halves of a float32's."""
    values = torch.randn(3, 4).bfloat16()
    [stored] = text_column({"x": values})["text"]
    assert stored["dtype"] == "bfloat16"
    upper = np.frombuffer(stored["data"], np.uint16).astype(np.uint32)
    assert np.array_equal((upper << 16).view(np.float32).reshape(stored["shape"]), values.float().numpy())
