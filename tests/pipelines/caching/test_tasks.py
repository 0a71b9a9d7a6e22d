"""Files that the processes and nodes of a cluster share: who reads them, and in which order it is told."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from pipelines.caching.parts import FILES_PER_PART, read_here
from pipelines.caching.tasks import FileTasks
from pipelines.config import Config
from prophy.errors import ProPhyError
from prophy.schema import MissingFileError, open_file
from tests.nodes import cluster

NAMES = [f"{number:03d}" for number in range(2 * FILES_PER_PART + 1)]


def who(names: list[str]) -> pa.Table:
    return pa.table({"name": names, "pid": [os.getpid()] * len(names)})


def read_together(folder: Path, names: list[str]) -> pa.Table:
    """Reads a part only while another process reads one too; says who read it, and on which node."""
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.01)
    return who(names).append_column("node", [[ray.util.get_node_ip_address()] * len(names)])


def test_one_part_takes_no_other_process(config: Config) -> None:
    names = NAMES[:FILES_PER_PART]
    with FileTasks(config) as read_parts:
        [part] = read_parts("read", who, names)
        assert not list(read_parts("read", who, []))
    assert part.equals(who(names))


def test_several_processes_read_and_what_they_found_is_in_order(
    ray_cluster: None, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FileTasks(config) as read_parts:
        parts = list(read_parts("read", partial(read_together, tmp_path), NAMES))
    found = pa.concat_tables(parts)
    assert found["name"].to_pylist() == NAMES
    assert [len(part) for part in parts] == [len(part) for part in read_here("read", who, NAMES)]
    pids = set(found["pid"].to_pylist())
    assert len(pids) > 1 and os.getpid() not in pids
    assert f"{len(NAMES)}/{len(NAMES)}" in capsys.readouterr().out


def refuse_late(folder: Path, names: list[str]) -> pa.Table:
    """The first part cannot be read, and says so only after the last, which cannot either."""
    if NAMES[-1] in names:
        (folder / "refused").touch()
    if NAMES[0] in names:
        while not (folder / "refused").exists():
            time.sleep(0.01)
    if {NAMES[0], NAMES[-1]} & {*names}:
        raise ProPhyError(f"{names[0]} cannot be read")
    return who(names)


def test_the_first_file_that_cannot_be_read_is_named(
    ray_cluster: None, config: Config, tmp_path: Path
) -> None:
    """The first by name, as by one process: not the first that a process came to."""
    with pytest.raises(ProPhyError, match=f"^{NAMES[0]} cannot be read$"), FileTasks(config) as read_parts:
        list(read_parts("read", partial(refuse_late, tmp_path), NAMES))


def open_files(folder: Path, names: list[str]) -> pa.Table:
    for name in names:
        with open_file(folder / name):
            pass
    return who(names)


def test_a_node_that_does_not_see_the_folder_is_named(
    ray_cluster: None, config: Config, tmp_path: Path
) -> None:
    node = ray.util.get_node_ip_address()
    with (
        pytest.raises(
            MissingFileError, match=rf"{NAMES[0]} is gone; .* does node {node} not see that folder"
        ),
        FileTasks(config) as read_parts,
    ):
        list(read_parts("read", partial(open_files, tmp_path), NAMES))


READ_TOGETHER = """
import json, sys
from functools import partial
from pathlib import Path

import pyarrow as pa

from pipelines.caching.tasks import FileTasks
from pipelines.config import load_config
from tests.pipelines.caching.test_tasks import NAMES, read_together

with FileTasks(load_config("tiny", [])) as read_parts:
    found = pa.concat_tables(read_parts("read", partial(read_together, Path(sys.argv[1])), NAMES))
print(json.dumps([found["name"].to_pylist(), sorted({*found["node"].to_pylist()})]))
"""


@pytest.mark.heavy
def test_the_nodes_of_a_cluster_share_the_files(tmp_path: Path) -> None:
    """Each has one CPU: who reads together with another is on another node."""
    with cluster() as nodes:
        addresses = sorted(nodes.add(num_cpus=1).node_ip_address for _ in range(2))
        environment = os.environ | {"RAY_ADDRESS": nodes.address, "PYTHONPATH": os.getcwd()}
        command = [sys.executable, "-c", READ_TOGETHER, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [NAMES, addresses]
