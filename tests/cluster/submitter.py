"""What KubeRay's submitter does with a RayJob's entrypoint, with stand-ins for the commands that it runs."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

_ADDRESS = "http://head:8265"
# `ray job submit` puts its arguments together as a shell reads them, and the head has a shell run them.
_RAY = """#!/usr/bin/env python3
import os, pathlib, shlex, subprocess, sys
status = pathlib.Path(os.environ["PLACE"], "status")
if sys.argv[2] == "submit":
    entrypoint = shlex.join(sys.argv[sys.argv.index("--") + 1:])
    code = subprocess.run(entrypoint, shell=True, env=os.environ | {"POD": "head"}).returncode
    status.write_text("SUCCEEDED" if code == 0 else "FAILED")
sys.exit(not status.exists())
"""
_PROPHY = """#!/bin/sh
echo "$POD: prophy $*" >> "$PLACE/ran"
[ "$1" != "$FAILS" ]
"""


def shell_command(job: dict[str, Any]) -> str:
    """The command line of the submitter's pod, in `submissionMode: K8sJobMode`.

    As `BuildJobSubmitCommand` of KubeRay 1.7 builds it: words joined by blanks, the entrypoint among them as
    it stands in the manifest.
    """
    spec, name = job["spec"], "job-0"
    environment = json.dumps(json.dumps(yaml.safe_load(spec.get("runtimeEnvYAML", "{}"))))
    submit = ["ray job submit --address", _ADDRESS, "--no-wait --runtime-env-json", environment]
    return " ".join(
        [
            f"if ! ray job status --address {_ADDRESS} {name} >/dev/null 2>&1 ; then",
            *(*submit, "--submission-id", name, "--", spec["entrypoint"].strip(), ";", "fi", ";"),
            f"ray job logs --address {_ADDRESS} --follow {name}",
        ]
    )


def run_submitter(job: dict[str, Any], folder: Path, fails: str = "") -> tuple[list[str], str]:
    """Runs the submitter's command.

    Args:
        job: the manifest.
        folder: an empty one.
        fails: the command of `prophy` that ends with an error.

    Returns:
        Where which command of `prophy` ran, in order, and the status of Ray's job.
    """
    for name, text in (("ray", _RAY), ("prophy", _PROPHY)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "PLACE": str(folder)}
    environment |= {"POD": "submitter", "FAILS": fails}
    subprocess.run(["bash", "-ce", shell_command(job)], env=environment, check=False, timeout=60)
    return (folder / "ran").read_text().splitlines(), (folder / "status").read_text()
