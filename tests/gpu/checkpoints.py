"""How long a checkpoint takes to write, to check and to read; it comes back to the last bit."""

import tempfile
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from pipelines.training.checkpoint_places import FolderStore
from pipelines.training.saving import Fragment, Save
from tests.gpu.models import DEVICE, GPU
from tests.gpu.rows import Row, wait

NAME, KINDS = "physics_branch.weight", ("parameter", "exp_avg", "exp_avg_sq")


def check() -> Iterator[Row]:
    """One rank's share: on a GPU as large as the 1.3B's branch with its optimizer."""
    size = 300_000_000 if GPU else 1_000_000
    torch.manual_seed(0)
    held = {kind: torch.randn(size, device=DEVICE) for kind in KINDS}
    num_bytes = 4 * size * len(KINDS)

    def told(what: str, start: float) -> Row:
        wait()
        seconds = time.perf_counter() - start
        rate = f"{num_bytes / seconds / 1e9:.2g} GB/s"
        return Row(f"checkpoint of {num_bytes / 1e9:.2g} GB, {what}", f"{seconds:.3g} s, {rate}")

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with tempfile.TemporaryDirectory(prefix="prophy-") as name:
            store, start = FolderStore(name), time.perf_counter()
            save = Save(store, 1, [Fragment(NAME, 0, held)], {NAME: torch.Size([size])}, {})
            yield told("copied, for which a step waits", start)
            save.commit(num_to_keep=1)
            yield told("saved", start)
            start = time.perf_counter()
            with store.latest() as checkpoint:
                yield told("checked", start)
                assert checkpoint is not None
                start = time.perf_counter()
                read = {kind: checkpoint.read(kind, NAME).to(DEVICE) for kind in KINDS}
                yield told("read", start)
    finally:
        dist.destroy_process_group()
    wrong = sum((read[kind] != held[kind]).sum().item() for kind in KINDS)
    yield Row("numbers of it that come back otherwise", f"{wrong}", "0", wrong == 0)
