"""The image of a request: a file of a form, or an object as OpenAI's API has it. Nothing is fetched."""

import base64
from typing import Any

from pydantic import WithJsonSchema

from pipelines.serving.errors import ApiError

IMAGE_FIELD = "input_reference"
DESCRIPTION = (
    "image that the video begins with, cut at its centre to the video's shape: a PNG, JPEG or WebP, as a "
    "file of a form, or as an object with a data: URL"
)
SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string", "format": "binary"},
            {
                "type": "object",
                "properties": {"image_url": {"type": "string", "pattern": "^data:[^,]*;base64,"}},
                "required": ["image_url"],
                "additionalProperties": False,
            },
        ]
    }
)


def image_of(given: Any, max_bytes: int) -> bytes:
    """The file that a request holds; what is in it, nobody has looked at yet.

    Args:
        given: the content of a file, or what stands there in JSON.
        max_bytes: longer ones are refused.

    Raises:
        ApiError: it is too long, or no image is given so.
    """
    match given:
        case bytes():
            content = given
        case {"image_url": str(url), **further} if not further:
            content = _decoded(url)
        case _:
            raise _refusal('give a file of a form, or {"image_url": "data:image/png;base64,..."}')
    if len(content) > max_bytes:
        message = f"the image has {len(content)} bytes; give one of at most {max_bytes}"
        raise ApiError(413, message, "image_too_large", IMAGE_FIELD)
    return content


def _decoded(url: str) -> bytes:
    head, _, data = url.partition(",")
    if not head.lower().startswith("data:"):
        raise _refusal("no URL is fetched here; send the image itself, as a file or as a data: URL")
    if not head.lower().endswith(";base64"):
        raise _refusal("the data: URL is not in base64; begin it with data:image/png;base64,")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        raise _refusal("what follows the comma of the data: URL is no base64; encode the file anew") from None


def _refusal(reason: str) -> ApiError:
    return ApiError(422, f"bad value for the field {IMAGE_FIELD!r}: {reason}", "invalid_value", IMAGE_FIELD)
