"""The sha256 of a file inside the file itself: for what is read by its name, and not named by its content.

A Parquet file has checksums of its pages, but none of its footer, nor of the pages' own headers.
"""

import hashlib
import re

_KEY, _BLANK = b"prophy.sha256", b"0" * 64
PLACE = {_KEY: _BLANK}
"""Metadata that leaves room for the digest."""

# As the footer has it: the key after its length, the value after its type and its length.
_FOUND = re.compile(
    bytes([len(_KEY)]) + re.escape(_KEY) + b"\x18" + bytes([len(_BLANK)]) + b"(.{64})", re.DOTALL
)


def sealed(content: bytes) -> bytes:
    """The bytes of a file with their digest in its place, or as they are where there is no such place.

    The digest is of the bytes with zeros in its place: what is intact is sealed already.
    """
    places = [found.span(1) for found in _FOUND.finditer(content)]
    if not places:
        return content
    before, after = content[: places[-1][0]], content[places[-1][1] :]
    return before + hashlib.sha256(before + _BLANK + after).hexdigest().encode() + after
