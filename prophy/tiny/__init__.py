"""The embedded default: the real model classes in small configurations, built on a machine's first use."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def build_once(name: str, recipe: str, build: Callable[[Path], None]) -> Path:
    """The folder `$PROPHY_HOME/<name>-<hash of recipe>` (home: ~/.cache/prophy by default), built if missing.

    Args:
        name: what is built.
        recipe: everything that the result depends on; another recipe is another folder.
        build: fills the empty folder that it is given. Processes may build at once: the first to finish wins.
    """
    home = Path(os.environ.get("PROPHY_HOME") or Path.home() / ".cache" / "prophy")
    folder = home / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    home.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=home))
    try:
        build(scratch)
        scratch.chmod(0o755)
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():  # not another process that was first
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
