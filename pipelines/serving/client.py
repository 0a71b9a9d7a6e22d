"""`prophy request`: asks a server for a video, shows its progress and saves it."""

import json
import time
from pathlib import Path
from typing import Any

import httpx
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from prophy.errors import ProPhyError

PATIENCE_S = 60.0  # a server that does not answer may be starting anew
RETRY_S = 1.0
TIMEOUT_S = 60.0
_TEXTS = ("seconds", "size")  # strings in the Videos API, even where they look like numbers


def run(
    url: str,
    prompt: str,
    out: Path,
    fields: list[str],
    api_key: str | None = None,
    image: Path | None = None,
) -> Path:
    """Makes one video on a server, and writes it to `out`.

    Args:
        url: the server's.
        prompt: what the video shows.
        out: the mp4; its folder is created.
        fields: further fields of the request, `name=value` each, as `physics.strength.collision=2`.
        api_key: if the server asks for one.
        image: what the video starts from, if the server's model takes one.

    Raises:
        ProPhyError: there is no such image; the server cannot be reached, refuses the request, or could not
            make the video.
    """
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=TIMEOUT_S) as http:
        body = {"prompt": prompt, **_parse(fields)}
        video = _call(http, "POST", "/v1/videos", **_content(body, image)).json()
        try:
            _watch(http, video)
        except KeyboardInterrupt:
            _call(http, "DELETE", f"/v1/videos/{video['id']}")
            raise ProPhyError(f"stopped; video {video['id']} is cancelled") from None
        content = _call(http, "GET", f"/v1/videos/{video['id']}/content").content
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(content)
    except OSError as error:
        raise ProPhyError(
            f"cannot write {out}: {error.strerror}; it is still at {url}/v1/videos/{video['id']}/content"
        ) from None
    return out


def _parse(fields: list[str]) -> dict[str, Any]:
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist(fields))
    except OmegaConfBaseException as error:
        raise ProPhyError(f"bad --field: {error}; give NAME=VALUE") from None
    return {name: str(value) if name in _TEXTS else value for name, value in parsed.items()}


def _content(body: dict[str, Any], image: Path | None) -> dict[str, Any]:
    """The arguments of a request: JSON, or a form where there is an image."""
    if image is None:
        return {"json": body}
    try:
        content = image.read_bytes()
    except OSError as error:
        raise ProPhyError(f"cannot read the image {image}: {error.strerror}") from None
    form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in body.items()}
    return {"data": form, "files": {"input_reference": (image.name, content)}}


def _watch(http: httpx.Client, video: dict[str, Any]) -> None:
    """Polls until the video is completed, as often as the server advises.

    Raises:
        ProPhyError: it failed.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bar: TaskID = progress.add_task("queued")
        while True:
            response = _call(http, "GET", f"/v1/videos/{video['id']}")
            video = response.json()
            progress.update(bar, description=video["status"], completed=video["progress"])
            if video["status"] == "completed":
                return
            if video["status"] == "failed":
                raise ProPhyError(
                    f"the server could not make video {video['id']}: {video['error']['message']}"
                )
            time.sleep(int(response.headers.get("openai-poll-after-ms", 1000)) / 1000)


def _call(http: httpx.Client, method: str, path: str, **content: Any) -> httpx.Response:
    """One request; one that may find a better moment is sent again for `PATIENCE_S`.

    Raises:
        ProPhyError: no answer, or an error.
    """
    deadline = time.monotonic() + PATIENCE_S
    # A POST that got no answer may have been accepted: a second one would make a second video.
    passing = (429, 503) if method == "POST" else (429, 500, 502, 503, 504)
    while True:
        wait_s = RETRY_S
        try:
            response = http.request(method, path, **content)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            failure = f"no answer from {http.base_url} ({error}); is `prophy serve` running there?"
            is_final = method == "POST"
        else:
            if response.is_success:
                return response
            failure = _message(response)
            is_final = response.status_code not in passing
            retry_after = response.headers.get("retry-after", "")
            wait_s = float(retry_after) if retry_after.isdigit() else RETRY_S  # else a date
        if is_final or time.monotonic() + wait_s > deadline:
            raise ProPhyError(failure)
        time.sleep(wait_s)


def _message(response: httpx.Response) -> str:
    """What the server says is wrong; proxies between say it in shapes of their own."""
    try:
        return f"the server refuses: {response.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"the server answers {response.status_code} {response.reason_phrase}"
