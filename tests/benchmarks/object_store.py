"""Claim: how long a cache's files take in S3, and as copies of what lies there, against a disk.

S3 is moto's server in the same process, so what is measured is our part and that of a Python program, and
not a network or a real store. The same files are written to both; then rows are read in random order, as
training does: first where no copies are there, then from those that the first reading made.

    python tests/benchmarks/object_store.py               # 24 files of 32 clips
    python tests/benchmarks/object_store.py --files 8 --row-bytes 8000000    # clips of a large backbone
"""

import argparse
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from moto.server import ThreadedMotoServer
from rich import box
from rich.console import Console
from rich.table import Table as Printed
from s3fs import S3FileSystem

from pipelines.caching.tables import file_names, write_file
from prophy.places import Place, place_of
from prophy.schema import VERSION_FOOTER, open_file
from prophy.staging import on_disk

ROWS_PER_FILE, MANY = 32, 1 << 60


@contextmanager
def bucket(scratch: Path) -> Iterator[Place]:
    """A place in a server of this process; AWS's own configuration says where it is."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    (scratch / "aws").write_text(
        "[default]\naws_access_key_id = a\naws_secret_access_key = b\nregion = us-east-1\n"
        f"endpoint_url = http://{host}:{port}\n"
    )
    os.environ |= {"AWS_CONFIG_FILE": str(scratch / "aws"), "PROPHY_HOME": str(scratch / "home")}
    S3FileSystem().mkdir("bucket")
    yield place_of("s3://bucket/cache", "cache.output")
    server.stop()


def write(folder: Place, tables: list[pa.Table]) -> None:
    """Writes a file of each table."""
    for rows in tables:
        write_file(folder, rows, VERSION_FOOTER, row_group_size=1)


def read(folder: Place, seed: int) -> None:
    """Reads as many rows as there are, each of a file at random."""
    rng, names = random.Random(seed), file_names(folder)
    for _ in range(ROWS_PER_FILE * len(names)):
        with on_disk(folder / rng.choice(names), MANY) as path, open_file(path) as file:
            file.read_row_group(rng.randrange(ROWS_PER_FILE), use_threads=False)


def seconds(work: Callable[[Place], None], folder: Place) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work(folder)
    return time.perf_counter() - start


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=24)
    parser.add_argument("--row-bytes", type=int, default=250_000, help="bytes of a clip, random ones")
    options = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else moto tells of every request
    rng = np.random.default_rng(0)
    rows = [[rng.bytes(options.row_bytes) for _ in range(ROWS_PER_FILE)] for _ in range(options.files)]
    tables = [pa.table({"latents": each}) for each in rows]
    grid = Printed("work", "disk, s", "S3, s", "ratio", box=box.MARKDOWN)
    with tempfile.TemporaryDirectory() as scratch, bucket(Path(scratch)) as there:
        here = place_of(f"{scratch}/cache", "cache.output")
        steps: dict[str, Callable[[Place], None]] = {
            "write": partial(write, tables=tables),
            "read, copies are made": partial(read, seed=1),
            "read from copies": partial(read, seed=2),
        }
        for name, work in steps.items():
            disk, s3 = (seconds(work, folder) for folder in (here, there))
            grid.add_row(name, f"{disk:.2f}", f"{s3:.2f}", f"{s3 / disk:.2f}")
    megabytes = options.files * ROWS_PER_FILE * options.row_bytes / 1e6
    Console(width=100).print(
        f"{options.files} files, {megabytes:.0f} MB; S3 is moto on this machine", grid, sep="\n"
    )


if __name__ == "__main__":
    main()
