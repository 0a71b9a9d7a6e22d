"""The embedded default: the real model classes in small configurations, trained by our own recipe.

`weights/` holds a folder per part as diffusers and transformers save it, a model card in each, and
`sha256.json`, which names every file that is loaded.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from prophy.errors import ProPhyError
from prophy.hashing import file_sha256, home

EMBEDDED = "tiny"
"""What configurations and records call the embedded models: no path, so that it holds on every machine."""

WEIGHTS = Path(__file__).parent / "weights"
_SHA256 = "sha256.json"
_LOADED = (".safetensors", ".json", ".jinja")


def bundled(part: str) -> Path:
    """The folder of a part (`vlm`, `vae`, `transformer` or `branch`), after its files were checked.

    Raises:
        ProPhyError: a file is missing, or is not the one that was shipped.
    """
    for name, expected in part_sha256(part).items():
        path = WEIGHTS / name
        if not path.is_file() or file_sha256(path) != expected:
            raise _damaged(path)
    return WEIGHTS / part


def part_sha256(part: str) -> dict[str, str]:
    """The sha256 of each file of a part, by its path in `weights/`.

    Raises:
        ProPhyError: the file that lists them is missing.
    """
    if not (WEIGHTS / _SHA256).is_file():
        raise _damaged(WEIGHTS / _SHA256)
    files: Mapping[str, str] = json.loads((WEIGHTS / _SHA256).read_text())
    return {name: value for name, value in files.items() if name.startswith(f"{part}/")}


def part_fingerprint(part: str) -> str:
    """What a part is: the same on every machine; its model card plays no part."""
    return hashlib.sha256(json.dumps(part_sha256(part), sort_keys=True).encode()).hexdigest()


def ship(parts: Mapping[str, Path]) -> None:
    """Puts newly trained parts into `weights/`.

    Args:
        parts: folder of each part that was trained; the others stay.
    """
    for part, folder in parts.items():
        for file in sorted(folder.iterdir()):
            (WEIGHTS / part).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, WEIGHTS / part / file.name)
    files = sorted(path for path in WEIGHTS.glob("*/*") if path.suffix in _LOADED)
    sums = {path.relative_to(WEIGHTS).as_posix(): file_sha256(path) for path in files}
    (WEIGHTS / _SHA256).write_text(json.dumps(sums, indent=2) + "\n")


def build_once(name: str, recipe: str, build: Callable[[Path], None]) -> Path:
    """The folder `$PROPHY_HOME/<name>-<hash of recipe>` (home: ~/.cache/prophy by default), built if missing.

    Args:
        name: what is built.
        recipe: everything that the result depends on; another recipe is another folder.
        build: fills the empty folder that it is given. Processes may build at once: the first to finish wins.
    """
    folder = home() / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
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


def _damaged(path: Path) -> ProPhyError:
    return ProPhyError(
        f"{path} is missing or damaged; check out prophy/tiny/weights again, or reinstall prophy-ray"
    )
