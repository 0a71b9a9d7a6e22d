"""`prophy serve` killed under load, in parts or as a whole: every accepted job is finished, and none twice.

One real server with a Ray of its own; only its model is a stand-in, which waits until it may go on. Replicas
of half a CPU scale from zero to two, and back.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from pipelines.serving.middleware import hash_key, new_key
from tests.servers import PATIENCE_S, PROMPT, check_error, submit, until

pytestmark = pytest.mark.processes

KEY = new_key()
SETTINGS = (
    "serve.host=0.0.0.0",
    f"serve.api_keys=[{hash_key(KEY)}]",
    "serve.port=0",
    "serve.max_replicas=2",
    "serve.num_cpus=0.5",
    "serve.upscale_delay_s=0",
    "serve.downscale_delay_s=10",
    "ray.num_cpus=1",
)
GENERATOR, INGRESS = "ray::.*ServeReplica:prophy:VideoGenerator", "ray::.*ServeReplica:prophy:VideoAPI"


class Server:
    """`prophy serve` in a process of its own, and the jobs that it has accepted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seeds: dict[str, int] = {}
        self.start()

    def start(self) -> None:
        options = [part for item in (f"run_dir={self.folder}", *SETTINGS) for part in ("--set", item)]
        self.log = self.folder / "server.log"
        with self.log.open("w") as output:
            self.process = psutil.Popen(
                [sys.executable, "-m", "tests.waiting_server", "serve", *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": os.getcwd()},
            )
        until(
            lambda: self.process.poll() is not None or "serving on" in self.log.read_text(),
            "the server has started or ended",
        )
        match = re.search(r"serving on (http://\S+)", self.log.read_text())
        assert match is not None, self.log.read_text()[-3000:]
        self.client = httpx.Client(base_url=match[1], headers={"authorization": f"Bearer {KEY}"}, timeout=60)

    def stop(self) -> None:
        """SIGTERM."""
        self.process.terminate()
        assert self.process.wait(PATIENCE_S) == 0, self.log.read_text()[-6000:]
        self.client.close()

    def kill(self, actor: str, count: int) -> None:
        """SIGKILL to as many processes of an actor, once they are there."""
        until(lambda: len(self.processes(actor)) >= count, f"{count} of {actor} are there")
        for process in self.processes(actor)[:count]:
            process.kill()

    def processes(self, actor: str) -> list[psutil.Process]:
        """Ray puts an actor's name, and what it does, into the title of its process."""
        family = self.process.children(recursive=True)
        return [process for process in family if re.search(actor, " ".join(process.cmdline()))]

    def burst(self, num_jobs: int) -> list[str]:
        """Submits jobs at once, of which none is finished before `go`."""
        (self.folder / "go").unlink(missing_ok=True)
        first = len(self.seeds)
        ids = [submit(self.client, prompt=PROMPT, seed=first + index) for index in range(num_jobs)]
        self.seeds |= {video_id: first + index for index, video_id in enumerate(ids)}
        return ids

    def go(self) -> None:
        (self.folder / "go").touch()

    def count(self, ids: list[str], status: str) -> int:
        """How many of these videos have a status; -1 while the server does not say."""
        try:
            response = self.client.get("/v1/videos", params={"limit": len(ids)})
        except httpx.TransportError:  # the proxy is away
            return -1
        if not response.is_success:  # the ingress is
            assert response.status_code in (502, 503), response.text
            check_error(response, response.status_code, "unavailable")
            return -1
        return sum(video["status"] == status for video in response.json()["data"] if video["id"] in ids)

    def num_replicas(self) -> int:
        text = self.client.get("/metrics").raise_for_status().text
        return int(float(re.search(r"^prophy_replicas (\S+)", text, re.MULTILINE)[1]))

    def check_all_made_once(self, ids: list[str], num_interrupted: int) -> None:
        """Every job is completed, once; begun twice are only those that were interrupted."""
        until(lambda: self.count(ids, "completed") == len(ids), "all videos are completed")
        for video_id in ids:
            video = self.client.get(f"/v1/videos/{video_id}/content").raise_for_status()
            assert video.text == str(self.seeds[video_id])
        logs = Path(os.environ["RAY_TMPDIR"]).glob("ray/session_2*/logs/serve/replica_prophy_VideoAPI_*")
        events = "".join(log.read_text() for log in logs)
        completed = Counter(re.findall(r'"video (video_\w+) completed', events))
        assert {video_id: completed[video_id] for video_id in ids} == dict.fromkeys(ids, 1)
        renders = [line.split() for line in (self.folder / "renders.log").read_text().splitlines()]
        seeds = {str(self.seeds[video_id]) for video_id in ids}
        begun = Counter(seed for event, seed, _ in renders if event == "begin" and seed in seeds)
        assert begun.keys() == seeds and begun.total() <= len(ids) + num_interrupted, begun


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("kill"))
    yield server
    server.stop()


def test_the_endpoint_alone_is_open_to_other_machines(server: Server) -> None:
    (haproxy,) = server.processes("bin/haproxy")
    listening = {
        connection.laddr.port: connection.laddr.ip
        for connection in haproxy.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {server.client.base_url.port: "0.0.0.0"}


few_or_many = pytest.mark.parametrize("num_jobs", [8, pytest.param(50, marks=pytest.mark.slow)])


@few_or_many
def test_replicas_come_and_go_with_the_queue(server: Server, num_jobs: int) -> None:
    until(lambda: server.num_replicas() == 0, "no replica is left")
    ids = server.burst(num_jobs)
    seen = [0]

    def are_two() -> bool:
        seen.append(server.num_replicas())
        return seen[-1] == 2

    until(are_two, "there are two replicas")
    assert seen == sorted(seen)
    server.go()
    server.check_all_made_once(ids, num_interrupted=0)
    until(lambda: server.num_replicas() == 0, "no replica is left")


@few_or_many
@pytest.mark.parametrize(
    ("actor", "count"),
    [
        pytest.param(GENERATOR, 1, id="one replica"),
        pytest.param(GENERATOR, 2, id="all replicas"),
        pytest.param(INGRESS, 1, id="ingress"),
        pytest.param("ray::.*ServeController", 1, id="controller", marks=pytest.mark.slow),
        pytest.param("bin/haproxy", 1, id="haproxy", marks=pytest.mark.slow),
        pytest.param("ray::.*HAProxyManager", 1, id="manager of haproxy", marks=pytest.mark.slow),
        pytest.param("ray::.*ProxyActor", 1, id="proxy", marks=pytest.mark.slow),
    ],
)
def test_killed_in_mid_video(server: Server, actor: str, count: int, num_jobs: int) -> None:
    ids = server.burst(num_jobs)
    until(lambda: server.count(ids, "in_progress") == 2, "two videos are in progress")
    server.kill(actor, count)
    server.go()
    server.check_all_made_once(ids, num_interrupted=2)


def test_a_device_that_fails_costs_no_job(server: Server) -> None:
    """Every later call fails too, and at once: such a replica must not take one job after the other."""
    (server.folder / "device error").touch()
    ids = server.burst(5)
    server.go()
    server.check_all_made_once(ids, num_interrupted=1)
    assert not (server.folder / "device error").exists()


@few_or_many
def test_stopped_in_mid_video_and_started_again(server: Server, num_jobs: int) -> None:
    ids = server.burst(num_jobs)
    until(lambda: server.count(ids, "in_progress") == 2, "two videos are in progress")
    server.stop()
    server.start()
    server.go()
    server.check_all_made_once(ids, num_interrupted=2)


@pytest.mark.slow
def test_a_model_that_cannot_run_ends_the_server_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    command = [sys.executable, "-m", "tests.waiting_server", "serve"]
    for item in (f"run_dir={tmp_path}", *SETTINGS):
        command += ["--set", item]
    server = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": os.getcwd()}, stderr=subprocess.PIPE, text=True, check=False
    )
    assert server.returncode == 2
    assert server.stderr.endswith(
        "error: VideoGenerator does not start: MemoryError: no memory for the model\n"
    )
