"""What the README has people type and put into the secret."""

import re
import shlex

from pipelines.runtime import WORKER_ENVIRONMENT
from tests.cluster.manifests import ROOT

TEXT = (ROOT / "cluster/README.md").read_text()


def test_nodes_of_your_own_start_as_those_of_the_image_and_take_jobs_of_others() -> None:
    lines = re.findall(r"^ {4}(.*)$", TEXT.partition("## Your own machines")[2], flags=re.MULTILINE)
    words = [shlex.split(line, comments=True) for line in lines]
    exported = dict(word.split("=", 1) for line in words if line[:1] == ["export"] for word in line[1:])
    assert WORKER_ENVIRONMENT.items() <= exported.items()
    [head] = [line for line in words if line[:3] == ["ray", "start", "--head"]]
    assert "--dashboard-host=0.0.0.0" in head  # by default that machine alone reaches the job server
