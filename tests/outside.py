"""What another package plugs in, as if it were installed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def plugged_in(folder: Path, group: str, name: str, value: str) -> Iterator[None]:
    """Puts a distribution with one entry point into `folder`, and that on the path of this process.

    Args:
        folder: as it were `site-packages`.
        group: the entry point's group.
        name: the entry point's name.
        value: `module:attribute`.
    """
    package = value.partition(":")[0].replace(".", "_")
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield
