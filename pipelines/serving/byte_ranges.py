"""Answers with a file, or with what the request wants of it, wherever the file lies."""

import re
from collections.abc import Callable, Iterator

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from pipelines.serving.errors import ApiError


def partial_content(
    request: Request,
    read: Callable[[int, int], Iterator[bytes]],
    size: int,
    file_name: str,
    media_type: str,
) -> Response:
    """The whole file (200) or one range of it (206); neither for a client that has it already (304).

    Several ranges, and units other than bytes, are answered with the whole file, as HTTP allows.

    Args:
        request: may carry `if-none-match`, `range` and `if-range`, which are for reading alone.
        read: (start, end) -> the bytes from `start` to before `end`, in pieces.
        size: bytes of the file.
        file_name: for the client's disk; also tells versions of files apart, since they never change.
        media_type: the content's.

    Raises:
        ApiError: 416, the range lies outside the file.
    """
    etag = f'"{file_name}"'
    if is_held(request, etag):
        return Response(status_code=304, headers={"etag": etag})
    headers = {
        "accept-ranges": "bytes",
        "etag": etag,
        "content-disposition": f'attachment; filename="{file_name}"',
    }
    start, end, status = 0, size, 200
    wanted = request.headers.get("range", "") if request.method == "GET" else ""
    asked = re.fullmatch(r"bytes=(\d{0,15})-(\d{0,15})", wanted.replace(" ", ""))
    if asked and any(asked.groups()) and request.headers.get("if-range", etag) == etag:
        first, last = asked.groups()
        start = int(first) if first else max(size - int(last), 0)
        end = min(int(last) + 1, size) if first and last else size
        if start >= end:
            outside = {"content-range": f"bytes */{size}"}
            raise ApiError(416, f"the file has only {size} bytes", "range_not_satisfiable", headers=outside)
        status = 206
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    headers["content-length"] = str(end - start)
    return StreamingResponse(read(start, end), status, headers, media_type)


def is_held(request: Request, etag: str) -> bool:
    """Whether the client reads what it has already, by its `if-none-match`.

    Args:
        request: the client's.
        etag: names what there is, in quotation marks.
    """
    if request.method not in ("GET", "HEAD"):
        return False
    given = ",".join(request.headers.getlist("if-none-match")).strip()
    return given == "*" or etag in re.findall(r'"[^"]*"', given)  # a weak one, W/"...", is as good
