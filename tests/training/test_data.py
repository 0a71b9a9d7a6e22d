"""The batch plan's promises, and training batches against the rows of a cache written by the real sink."""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from pipelines.caching.tables import Table, drop_samples, update_index, write_file
from prophy.errors import ProPhyError
from prophy.places import Place, place_of
from prophy.priors.grounding import make_targets
from prophy.schema import (
    EMPTY_PROMPT,
    ENCODINGS,
    INPUT,
    PRIORS,
    ROW_FILES,
    CacheInput,
    latents_columns,
    text_column,
)
from prophy.training.cache import PriorCache
from prophy.training.data import BatchPlan, ClipShape, PriorDataset, SemanticBatch, TrainBatch
from tests.object_store import object_store
from tests.wisa import PHENOMENA

SMALL: tuple[int, ...] = (4, 3, 4, 4)
WIDE: tuple[int, ...] = (4, 3, 4, 8)
CLIP_SHAPES = [ClipShape(9, SMALL, (3, 2, 2)), ClipShape(9, WIDE, (3, 2, 4))]
TEXT_SHAPES = {"prompt_embeds": (5, 6), "pooled_prompt_embeds": (3,)}  # as two text encoders make them
NULL_TEXT = {name: torch.full(shape, 0.5) for name, shape in TEXT_SHAPES.items()}
SOURCE = {"uri": "clip.mp4", "size": 1, "modified": 0.0}


def rows(name: str, shape: tuple[int, ...]) -> tuple[dict, dict]:
    """A row of priors and a row of encodings, the same for the same name."""
    random = np.random.default_rng(list(name.encode()))
    present = sorted(random.choice(17, size=random.integers(0, 3), replace=False).tolist())
    maps = random.random((len(present) + 1, 4, 2, 2), dtype=np.float32)
    prior = {
        "sample_id": name,
        "source": SOURCE,
        "content_hash": name,
        "start_s": 0.0,
        "end_s": 1.0,
        "fps": 8.0,
        "num_frames": 9,
        "height": 8,
        "width": 8,
        "vlm_caption": name,
        "answers": [],
        "phenomena": np.isin(np.arange(17), present).astype(np.float32),
        "map_phenomena": present,
        "maps": maps.ravel(),
        "maps_shape": maps.shape,
        "slice_times": [{"start_s": s / 4, "end_s": (s + 1) / 4} for s in range(maps.shape[1])],
    }
    latents = torch.from_numpy(random.standard_normal(shape, dtype=np.float32))
    text = {
        name: torch.from_numpy(random.standard_normal(shape, dtype=np.float32))
        for name, shape in TEXT_SHAPES.items()
    }
    encoding = {
        "sample_id": name,
        "source": SOURCE,
        "caption": name,
        **latents_columns(latents),
        **text_column(text),
    }
    return prior, encoding


def tables_in(folder: Path) -> tuple[Table, Table]:
    return (
        Table(folder / "priors", PRIORS, {"taxonomy": [*PHENOMENA]}, {}),
        Table(folder / "encodings" / "a", ENCODINGS, {}, {}),
    )


def write_cache(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    tables = tables_in(folder)
    samples = [rows(name, shape) for name, shape in shapes.items()]
    for table, content in zip(tables, zip(*samples, strict=True), strict=True):
        table.folder.mkdir(parents=True, exist_ok=True)
        for part in (content[:3], content[3:]):  # two files
            part_rows = pa.Table.from_pylist(list(part), table.schema)
            write_file(table.folder, part_rows, table.footer, row_group_size=1)
        update_index(table)
    empty = pa.Table.from_pylist([text_column(NULL_TEXT)])
    write_file(tables[1].folder, empty, {}, name=EMPTY_PROMPT)
    write_input(tables[1].folder, SOURCE)


def write_input(encodings: Place, *sources: dict) -> None:
    rows = CacheInput("/videos", pa.array(sources, PRIORS.field("source").type)).to_table()
    write_file(encodings, rows, rows.schema.metadata, name=INPUT)


def open_cache(folder: Path, encodings: str = "a") -> PriorCache:
    return PriorCache(folder / "priors", folder / "encodings" / encodings)


SHAPES = {f"s{i}": SMALL for i in range(9)} | {f"w{i}": WIDE for i in range(6)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> PriorCache:
    folder = tmp_path_factory.mktemp("cache")
    write_cache(folder, SHAPES)
    return open_cache(folder)


def test_samples_have_their_captions(cache: PriorCache) -> None:
    assert cache.captions().to_pylist() == cache.sample_ids.to_pylist()


def by_shape(shapes: dict[str, tuple[int, ...]]) -> dict[tuple[int, ...], pa.Array]:
    return {
        shape: pa.array(sorted(name for name in shapes if shapes[name] == shape))
        for shape in dict.fromkeys(shapes.values())
    }


def whole_plan(cache: PriorCache, seed: int = 0) -> BatchPlan:
    return BatchPlan(cache.by_shape(cache.sample_ids), 4, seed)


def dataset(
    cache: PriorCache,
    rank: int = 0,
    world_size: int = 1,
    micro: int = 4,
    seed: int = 0,
    image_share: float = 0.25,
) -> PriorDataset:
    return PriorDataset(
        cache,
        whole_plan(cache, seed),
        CLIP_SHAPES,
        micro_batch_size=micro,
        rank=rank,
        world_size=world_size,
        recipe="minus_background",
        negatives="zero",
        caption_dropout=0.5,
        image_share=image_share,
        seed=seed,
    )


def by_sample(batches: list[TrainBatch]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each sample, also those of its text, by name."""
    return {
        sample_id: {
            name: value[i]
            for name, value in (vars(batch) | batch.text).items()
            if isinstance(value, torch.Tensor)
        }
        for batch in batches
        for i, sample_id in enumerate(batch.sample_ids)
    }


def test_every_sample_comes_equally_often_and_epochs_are_whole() -> None:
    plan = BatchPlan(by_shape({f"s{i}": SMALL for i in range(10)}), 4, seed=1)
    stream = [sample for step in range(25) for sample in plan(step)]
    epochs = [stream[start : start + 10] for start in range(0, 100, 10)]
    assert all(sorted(epoch) == [f"s{i}" for i in range(10)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10


def test_batches_never_mix_shapes_and_no_shape_is_favoured() -> None:
    plan = BatchPlan(by_shape(SHAPES), 4, seed=1)
    batches = [plan(step) for step in range(60)]
    assert all(len({SHAPES[sample] for sample in batch}) == 1 for batch in batches)
    assert set(Counter(sample for batch in batches for sample in batch).values()) == {60 * 4 // 15}
    turns = [SHAPES[batch[0]] == WIDE for batch in batches]
    assert turns[:20] != sorted(turns[:20])


def test_plan_is_a_function_of_seed_and_step() -> None:
    plan, backwards = BatchPlan(by_shape(SHAPES), 4, seed=1), dict(reversed(by_shape(SHAPES).items()))
    assert [plan(step) for step in range(9)] == [BatchPlan(backwards, 4, seed=1)(step) for step in range(9)]
    assert plan(7) != BatchPlan(by_shape(SHAPES), 4, seed=2)(7)


def test_plan_refuses_fewer_samples_than_a_batch() -> None:
    with pytest.raises(ProPhyError, match="holds 15 samples, fewer than the global batch of 16"):
        BatchPlan(by_shape(SHAPES), 16, seed=0)


def test_a_rare_shape_fills_its_batches_with_its_few_samples() -> None:
    shapes = {"rare": WIDE, **{f"s{i}": SMALL for i in range(10)}}
    plan = BatchPlan(by_shape(shapes), 4, seed=1)
    batches = [plan(step) for step in range(44)]
    assert ["rare"] * 4 in batches
    assert set(Counter(sample for batch in batches for sample in batch).values()) == {44 * 4 // 11}


def test_batch_holds_what_the_cache_holds(cache: PriorCache) -> None:
    shapes = set()
    for step in range(4):
        [batch], semantic = dataset(cache)[step]
        shapes.add(tuple(batch.latents.shape[1:]))
        torch.testing.assert_close(semantic.text, batch.text, rtol=0, atol=0)
        assert torch.equal(semantic.phenomena, batch.phenomena)
        for sample_id, sample in by_sample([batch]).items():
            prior, encoding = rows(sample_id, SHAPES[sample_id])
            assert sample["latents"].numpy().tobytes() == encoding["latents"]
            assert {each["name"] for each in encoding["text"]} == TEXT_SHAPES.keys()
            for each in encoding["text"]:
                assert sample[each["name"]].numpy().tobytes() == each["data"]
            assert np.array_equal(sample["phenomena"], prior["phenomena"])
            grid = (3, 2, 2) if SHAPES[sample_id] == SMALL else (3, 2, 4)
            targets, mask = make_targets(
                torch.from_numpy(prior["maps"].reshape(prior["maps_shape"])),
                prior["map_phenomena"],
                sample["latents"],
                grid=grid,
                num_frames=9,
                slices=torch.tensor([[s / 4, (s + 1) / 4] for s in range(prior["maps_shape"][1])]).double(),
                num_phenomena=17,
                recipe="minus_background",
                negatives="zero",
            )
            assert torch.equal(sample["target_maps"], targets)
            assert torch.equal(sample["target_mask"], mask)
    assert shapes == {SMALL, WIDE}
    torch.testing.assert_close(cache.null_text(), NULL_TEXT, rtol=0, atol=0)


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_samples_and_noise_do_not_depend_on_the_workers(
    cache: PriorCache, world_size: int, micro: int
) -> None:
    for step in range(3):
        alone = by_sample(dataset(cache)[step][0])
        shares = [dataset(cache, rank, world_size, micro)[step] for rank in range(world_size)]
        assert all(len(batches) == 4 // world_size // micro for batches, _ in shares)
        together = by_sample([batch for batches, _ in shares for batch in batches])
        assert together.keys() == alone.keys()
        assert all(torch.equal(together[key][name], alone[key][name]) for key in alone for name in alone[key])
        for batches, semantic in shares:
            assert torch.equal(semantic.phenomena, torch.cat([batch.phenomena for batch in batches]))


def test_chance_differs_for_a_sample_that_is_there_twice(cache: PriorCache) -> None:
    source = dataset(cache)
    sample_id = cache.sample_ids[0].as_py()
    batch = source._batch(0, 0, [sample_id, sample_id])
    assert torch.equal(*batch.latents) and not torch.equal(*batch.noise)


def test_chance_depends_on_seed_step_and_sample(cache: PriorCache) -> None:
    draws = [by_sample(dataset(cache, seed=seed)[step][0]) for seed in (0, 1) for step in range(40)]
    samples = [sample for draw in draws for sample in draw.values()]
    assert len({sample["noise"].flatten()[0].item() for sample in samples}) == len(samples)
    quantiles = torch.stack([sample["timestep_quantile"] for sample in samples])
    assert 0 < quantiles.min() < 0.05 and 0.95 < quantiles.max() < 1
    assert quantiles.mean() == pytest.approx(0.5, abs=0.05)
    assert torch.stack([sample["drop_caption"] for sample in samples]).float().mean() == pytest.approx(
        0.5, abs=0.1
    )
    given = torch.stack([sample["given"] for sample in samples])
    assert given.float().mean() == pytest.approx(0.25, abs=0.1)
    noise = torch.cat([sample["noise"].flatten() for sample in samples])
    assert noise.mean() == pytest.approx(0, abs=0.02) and noise.std() == pytest.approx(1, abs=0.02)


def test_how_many_samples_begin_with_an_image_changes_no_other_chance(cache: PriorCache) -> None:
    for step in range(3):
        [never], [always] = dataset(cache, image_share=0.0)[step][0], dataset(cache, image_share=1.0)[step][0]
        assert not never.given.any() and always.given.all()
        for name, value in by_sample([always]).items():
            own = by_sample([never])[name]
            assert all(torch.equal(own[key], value[key]) for key in own if key != "given")


def test_a_single_latent_frame_is_never_given(tmp_path: Path) -> None:
    write_cache(tmp_path, {f"s{number}": (4, 1, 4, 4) for number in range(4)})
    shape = ClipShape(num_frames=1, latents=(4, 1, 4, 4), token_grid=(1, 2, 2))
    cache = open_cache(tmp_path)
    source = PriorDataset(
        cache,
        whole_plan(cache),
        [shape],
        micro_batch_size=4,
        rank=0,
        world_size=1,
        recipe="none",
        negatives="ignore",
        caption_dropout=0.0,
        image_share=1.0,
        seed=0,
    )
    assert not source[0][0][0].given.any()


def test_reader_process_gives_the_same_steps(cache: PriorCache) -> None:
    source = dataset(cache, rank=1, world_size=2, micro=1)
    loader = DataLoader(source, batch_size=None, sampler=range(3, 6), num_workers=1)
    for step, (batches, semantic) in zip(range(3, 6), loader, strict=True):
        expected, expected_semantic = source[step]
        assert isinstance(semantic, SemanticBatch) and torch.equal(
            semantic.phenomena, expected_semantic.phenomena
        )
        assert [batch.sample_ids for batch in batches] == [batch.sample_ids for batch in expected]
        assert all(torch.equal(a.noise, b.noise) for a, b in zip(batches, expected, strict=True))


def test_missing_cache(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="run `prophy cache`"):
        open_cache(tmp_path / "nothing")


def test_encodings_of_another_backbone(tmp_path: Path) -> None:
    write_cache(tmp_path, dict.fromkeys("abcd", SMALL))
    with pytest.raises(ProPhyError, match="another backbone or other clips"):
        open_cache(tmp_path, "b")


def test_tables_without_a_common_sample(tmp_path: Path) -> None:
    write_cache(tmp_path / "one", dict.fromkeys("abcd", SMALL))
    write_cache(tmp_path / "two", dict.fromkeys("efgh", SMALL))
    (tmp_path / "one" / "encodings").rename(tmp_path / "old")
    (tmp_path / "two" / "encodings").rename(tmp_path / "one" / "encodings")
    with pytest.raises(ProPhyError, match="no video of /videos is in both"):
        open_cache(tmp_path / "one")


def test_damaged_pages_are_named(tmp_path: Path) -> None:
    write_cache(tmp_path, dict.fromkeys("abcd", SMALL))
    opened = open_cache(tmp_path)
    files = sorted((tmp_path / "encodings" / "a").glob(ROW_FILES))
    for file in (*files, tmp_path / "encodings" / "a" / EMPTY_PROMPT):
        group = pq.read_metadata(file).row_group(0)
        columns = [group.column(number) for number in range(group.num_columns)]
        [column] = [column for column in columns if column.path_in_schema == "text.list.element.data"]
        content = bytearray(file.read_bytes())
        content[column.data_page_offset + column.total_compressed_size - 1] ^= 1
        file.write_bytes(content)
    with pytest.raises(ProPhyError, match=r"[0-9a-f]{64}.parquet is damaged; run `prophy cache verify`"):
        for sample_id in "abcd":
            opened.read(sample_id)
    with pytest.raises(ProPhyError, match=f"{EMPTY_PROMPT} is damaged"):
        opened.null_text()


def test_a_cache_that_is_pruned_under_a_reader(tmp_path: Path) -> None:
    """Its rows are in other files then; a sample that was taken out is named, with the cause."""
    write_cache(tmp_path, dict.fromkeys("abcdefg", SMALL))
    opened = open_cache(tmp_path)
    expected = [opened.read(sample_id).latents for sample_id in "abcdeg"]
    for table in tables_in(tmp_path):
        drop_samples(table, pa.array(["f"]))
    found = [opened.read(sample_id).latents for sample_id in "abcdeg"]
    assert all(map(torch.equal, found, expected))
    with pytest.raises(
        ProPhyError, match=r"the sample f was taken out of the cache .* by `prophy cache` or its `prune`; run"
    ):
        opened.read("f")


def test_latents_of_another_grid(cache: PriorCache) -> None:
    with pytest.raises(
        ProPhyError, match=r"w0 have shape \(4, 3, 4, 8\), the configured backbone makes \(4, 3, 4, 4\)"
    ):
        PriorDataset(
            cache,
            whole_plan(cache),
            CLIP_SHAPES[:1],
            micro_batch_size=4,
            rank=0,
            world_size=1,
            recipe="none",
            negatives="ignore",
            caption_dropout=0.0,
            image_share=0.0,
            seed=0,
        )


def test_a_cache_in_s3_is_read_as_one_on_a_disk(
    cache: PriorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PROPHY_HOME", str(tmp_path))
    with object_store() as store, caplog.at_level(logging.INFO, "prophy.staging"):
        store.mkdir("read")
        store.put(f"{cache._priors.parent}/", "read/cache/", recursive=True)
        place = place_of("s3://read/cache", "cache.output")
        there = PriorCache(place / "priors", place / "encodings" / "a", 10**9)
        assert there.sample_ids == cache.sample_ids and there.phenomena == cache.phenomena
        torch.testing.assert_close(there.null_text(), cache.null_text(), rtol=0, atol=0)
        there.tell_staging()
        assert "files of the cache, 0.00 GB, are copied from S3 to" in caplog.text
        for sample_id in there.sample_ids.to_pylist():
            ours, theirs = there.read(sample_id), cache.read(sample_id)
            torch.testing.assert_close(vars(ours), vars(theirs), rtol=0, atol=0)
        [copy, *_] = (tmp_path / "cache").glob("*.parquet")
        copy.write_bytes(bytes(copy.stat().st_size))  # as a failing disk does
        for sample_id in there.sample_ids.to_pylist():
            there.read(sample_id)
        assert f"{copy} is damaged, and is copied from S3 anew" in caplog.text
        with pytest.raises(
            ProPhyError, match="the encodings in s3://read/cache/encodings were made for another"
        ):
            PriorCache(place / "priors", place / "encodings" / "none", 10**9)
