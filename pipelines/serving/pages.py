"""The page at `/` for people: static files of this package, which ask nothing but the public API."""

from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from pipelines.serving.byte_ranges import is_held
from pipelines.serving.errors import ApiError

FOLDER = Path(__file__).parent / "page"
FILES = frozenset(path.name for path in FOLDER.iterdir())
_POLICY = ("default-src 'self'", "base-uri 'none'", "form-action 'self'", "frame-ancestors 'none'")
HEADERS = {
    "content-security-policy": "; ".join(_POLICY),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    # The browser asks each time whether a file is still the same: after an upgrade no old half stays.
    "cache-control": "no-cache",
}

router = APIRouter(include_in_schema=False)


@router.get("/")
def show_page(request: Request) -> Response:
    """The page."""
    return page_file("index.html", request)


@router.get("/page/{name}")
def page_file(name: str, request: Request) -> Response:
    """One file of the page.

    Raises:
        ApiError: 404, there is no such file.
    """
    if name not in FILES:
        raise ApiError(404, f"the page has no file {name[:64]!r}", "not_found")
    path = FOLDER / name
    file = FileResponse(path, headers=HEADERS, stat_result=path.stat())
    if is_held(request, file.headers["etag"]):
        return Response(status_code=304, headers={**HEADERS, "etag": file.headers["etag"]})
    return file
