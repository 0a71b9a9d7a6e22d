"""What the README has people type and put into the secret."""

import re
import shlex

from pipelines.runtime import WORKER_ENVIRONMENT
from tests.cluster.manifests import ROOT

TEXT = (ROOT / "cluster/README.md").read_text().replace("\\\n", " ")  # lines that go on


def test_nodes_of_your_own_start_as_those_of_the_image_and_take_jobs_of_others() -> None:
    lines = re.findall(r"^ {4}(.*)$", TEXT.partition("## Your own machines")[2], flags=re.MULTILINE)
    words = [shlex.split(line, comments=True) for line in lines]
    set_ = [word for line in words if line[:1] == ["export"] for word in line[1:] if "=" in word]
    exported = dict(word.split("=", 1) for word in set_)
    assert WORKER_ENVIRONMENT.items() <= exported.items()
    [head] = [line for line in words if line[:3] == ["ray", "start", "--head"]]
    assert "--dashboard-host=0.0.0.0" in head  # by default that machine alone reaches the job server


def test_the_secret_has_all_that_manifests_take_from_it() -> None:
    said = {*re.findall(r"--from-literal=(\w+)=", TEXT)}
    wanted = set[str]()
    for path in (ROOT / "cluster").rglob("*.yaml"):
        text = path.read_text()
        wanted |= {*re.findall(r"name: prophy-secrets, key: (\w+)", text)}
    assert {"PROPHY_API_KEY", "REDIS_PASSWORD"} <= wanted <= said


def test_the_walk_through_waits_for_no_end_that_may_not_come() -> None:
    assert "SUCCEEDED --timeout" not in TEXT
