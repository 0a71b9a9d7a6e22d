"""`prophy serve` as a process of its own, whose model is a stand-in that waits until it may go on."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx
import psutil

from pipelines.serving.middleware import hash_key, new_key
from tests.nodes import Nodes
from tests.servers import PATIENCE_S, PROMPT, check_error, submit, until

KEY = new_key()
SETTINGS = (
    "serve.host=0.0.0.0",
    f"serve.api_keys=[{hash_key(KEY)}]",
    "serve.port=0",
    "serve.max_replicas=2",
    "serve.num_cpus=0.5",
    "serve.upscale_delay_s=0",
    "serve.downscale_delay_s=10",
)
GENERATOR, INGRESS = "ray::.*ServeReplica:prophy:VideoGenerator", "ray::.*ServeReplica:prophy:VideoAPI"


class Server:
    """`prophy serve` in a process of its own, and the jobs that it has accepted.

    Args:
        folder: the run's.
        nodes: the cluster that it uses; by default it starts a Ray.
        settings: in addition to `SETTINGS`.
    """

    def __init__(self, folder: Path, nodes: Nodes | None = None, *settings: str) -> None:
        self.folder, self.nodes = folder, nodes
        self.seeds: dict[str, int] = {}
        self.command = [sys.executable, "-m", "tests.waiting_server", "serve"]
        for item in (f"run_dir={folder}", "ray.num_cpus=1", *SETTINGS, *settings):
            self.command += ["--set", item]
        self.environment = os.environ | {"PYTHONPATH": os.getcwd()}
        if nodes is not None:
            self.environment["RAY_ADDRESS"] = nodes.address
        self.start()

    def start(self) -> None:
        self.log = self.folder / "server.log"
        with self.log.open("w") as output:
            self.process = psutil.Popen(
                self.command, stdout=output, stderr=subprocess.STDOUT, env=self.environment
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
        family = self.nodes.processes() if self.nodes else self.process.children(recursive=True)
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
