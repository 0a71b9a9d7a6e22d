"""`prophy request`: asks a server for a video, shows its progress and saves it."""

import json
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from prophy.errors import ProPhyError

PATIENCE_S = 60.0  # a server that does not answer may be starting anew
RETRY_S = 1.0
TIMEOUT_S = 60.0
_PASSING = (429, 500, 502, 503, 504)
_NOBODY_THERE = (httpx.ConnectError, httpx.ConnectTimeout)
TEXTS = frozenset({"prompt", "model", "seconds", "size", "negative_prompt"})
"""Fields that are strings in the Videos API, even where they look like numbers."""


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
        ProPhyError: there is no such image; a field or the key is none; the server cannot be reached, refuses
            the request, or could not make the video.
    """
    body = {"prompt": prompt, **_parse(fields)}
    content = _content(body, image)
    with _connect(url, api_key) as http:
        once = {"idempotency-key": str(uuid.uuid4())}  # a repeated request makes no second video
        video = _video(_call(http, "POST", "/v1/videos", headers=once, **content))
        address = f"{url.rstrip('/')}/v1/videos/{video['id']}/content"
        try:
            with _accepted(video["id"], address):
                video = _watch(http, video)
        except KeyboardInterrupt:
            with _accepted(video["id"], address):
                _call(http, "DELETE", f"/v1/videos/{video['id']}")
            raise ProPhyError(f"stopped; video {video['id']} is cancelled") from None
        if video["status"] == "failed":
            raise ProPhyError(f"the server could not make video {video['id']}: {video['error']['message']}")
        with _accepted(video["id"], address):
            mp4 = _call(http, "GET", f"/v1/videos/{video['id']}/content").content
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(mp4)
    except OSError as error:
        raise ProPhyError(f"cannot write {out}: {error.strerror}; it is still at {address}") from None
    return out


def _connect(url: str, api_key: str | None) -> httpx.Client:
    """A client of the server.

    Raises:
        ProPhyError: the URL, the key, or a proxy that the environment names can be none.
    """
    if api_key and not re.fullmatch("[!-~]+", api_key):
        raise ProPhyError(
            "the API key has characters that no key has; set PROPHY_API_KEY to what `prophy key` printed"
        )
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ProPhyError(f"--url {url} is no URL ({error}); give one as http://127.0.0.1:8000") from None
    try:
        return httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=TIMEOUT_S)
    except (httpx.InvalidURL, ImportError, ValueError) as error:
        raise ProPhyError(
            f"cannot use the proxy of the environment ({error}); mend or unset HTTP_PROXY, HTTPS_PROXY and "
            "ALL_PROXY"
        ) from None


@contextmanager
def _accepted(video_id: str, address: str) -> Iterator[None]:
    """Has an error say where the video will be: its making goes on.

    Raises:
        ProPhyError: says so.
    """
    try:
        yield
    except ProPhyError as error:
        raise ProPhyError(
            f"video {video_id} was accepted, and is at {address} once it is made, but {error}"
        ) from None


def _parse(fields: list[str]) -> dict[str, Any]:
    """The fields as the Videos API has them: texts to the character, the others as YAML.

    Raises:
        ProPhyError: one is not NAME=VALUE, or has a value that cannot be sent.
    """
    parsed: dict[str, Any] = {}
    others = []
    for field in fields:
        name, sign, text = field.partition("=")
        if not sign:
            raise ProPhyError(f"bad --field {field!r}: it has no value; give NAME=VALUE")
        if name in TEXTS:
            parsed[name] = text
        else:
            others.append(field)
    try:
        values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(others))
        parsed |= values
        json.dumps(parsed, allow_nan=False)
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise ProPhyError(f"bad --field: {' '.join(str(error).split())}; give NAME=VALUE") from None
    return parsed


def _content(body: dict[str, Any], image: Path | None) -> dict[str, Any]:
    """The arguments of a request: JSON, or a form where there is an image.

    Raises:
        ProPhyError: a text is none, or the image cannot be read.
    """
    for name, value in body.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ProPhyError(f"the field {name!r} has bytes that are no UTF-8; type it anew") from None
    if image is None:
        return {"json": body}
    try:
        content = image.read_bytes()
    except OSError as error:
        raise ProPhyError(f"cannot read the image {image}: {error.strerror}") from None
    given = {name: value for name, value in body.items() if value is not None}
    form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
    return {"data": form, "files": {"input_reference": ("image", content)}}


def _watch(http: httpx.Client, video: dict[str, Any]) -> dict[str, Any]:
    """Polls until the video is completed or failed, as often as the server advises; returns it as it is then.

    Raises:
        ProPhyError: no answer, or an error.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bar: TaskID = progress.add_task("queued")
        while True:
            response = _call(http, "GET", f"/v1/videos/{video['id']}")
            video = _video(response)
            progress.update(bar, description=video["status"], completed=video["progress"])
            if video["status"] in ("completed", "failed"):
                return video
            time.sleep(int(response.headers.get("openai-poll-after-ms", 1000)) / 1000)


def _video(response: httpx.Response) -> dict[str, Any]:
    """The video that the server tells of.

    Raises:
        ProPhyError: it tells of something else.
    """
    try:
        video = response.json()
        known = video.keys() >= {"id", "status", "progress", "error"}
    except (ValueError, AttributeError):
        known = False
    if not known:
        raise ProPhyError(
            f"what answers at {response.url} is no Videos API; is --url that of `prophy serve`?"
        )
    return video


def _call(http: httpx.Client, method: str, path: str, **content: Any) -> httpx.Response:
    """One request; one that may find a better moment is sent again for `PATIENCE_S`.

    Raises:
        ProPhyError: no answer, or an error.
    """
    deadline = time.monotonic() + PATIENCE_S
    reached = method != "POST"  # whom nobody has reached yet may not be there at all
    while True:
        wait_s = RETRY_S
        try:
            response = http.request(method, path, **content)
        except httpx.RequestError as error:
            failure = f"there is no answer from {http.base_url} ({error}); is `prophy serve` running there?"
            reached = reached or not isinstance(error, _NOBODY_THERE)
            is_final = not reached or isinstance(error, httpx.UnsupportedProtocol)
        else:
            reached = True
            if response.is_success:
                return response
            failure = _message(response)
            is_final = response.status_code not in _PASSING
            retry_after = response.headers.get("retry-after", "")
            wait_s = float(retry_after) if retry_after.isdecimal() else RETRY_S  # else a date
        if is_final or time.monotonic() + wait_s > deadline:
            raise ProPhyError(failure)
        time.sleep(wait_s)


def _message(response: httpx.Response) -> str:
    """What the server says is wrong; proxies between say it in shapes of their own."""
    try:
        return f"the server refuses: {response.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"the server answers {response.status_code} {response.reason_phrase}"
