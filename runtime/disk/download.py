"""A photo at an address of the web."""

from __future__ import annotations

import base64
from http.client import HTTPException
from io import BytesIO
from urllib.parse import unquote
from urllib.request import Request, urlopen

from dsgnn.runtime.disk.signatures import HEAD, kind
from dsgnn.runtime.errors import InputError

TIMEOUT_S = 10.0
MOST_BYTES = 256 << 20


def photo_at(address: str) -> bytes | None:
    """The bytes of the photo that an http or https address gives, or None if it gives none.

    None stands for everything else: a video, an animation, and what does not answer. Raises
    InputError for a photo of more than MOST_BYTES.
    """
    scheme, _, rest = address.partition("://")
    if scheme.lower() not in ("http", "https"):
        return None
    host, slash, place = rest.partition("/")
    user, at, host = host.rpartition("@")
    try:
        request = Request(f"{scheme}://{host}{slash}{place}", headers={"User-Agent": "dsgnn"})
        if at:
            code = base64.b64encode(unquote(user).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {code}")
        with urlopen(request, timeout=TIMEOUT_S) as answer:
            head = answer.read(HEAD)
            if kind(BytesIO(head)) != "image":
                return None
            data = head + answer.read(MOST_BYTES)
    except (OSError, ValueError, HTTPException):
        return None
    if len(data) > MOST_BYTES:
        raise InputError(f"the photo has more than {MOST_BYTES >> 20} MB")
    # The beginning of an animation may look like a photo.
    return data if kind(BytesIO(data)) == "image" else None
