"""URLs as they may be shown: stream keys, passwords and tokens are for the other end alone."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote, urlsplit

HIDDEN = "***"


def redacted(url: str) -> str:
    """A URL without user, password, query and fragment, and without an RTMP URL's last part, which is its key."""
    parts = urlsplit(url)
    _, at, host = parts.netloc.rpartition("@")
    path = parts.path
    if parts.scheme in ("rtmp", "rtmps"):
        before, _, key = path.rstrip("/").rpartition("/")
        path = f"{before}/{HIDDEN}" if key else path
    shown = f"{parts.scheme}://{HIDDEN + at if at else ''}{host}{path}"
    return f"{shown}?{HIDDEN}" if parts.query or parts.fragment else shown


def blanked(text: str, url: str) -> str:
    """A text that somebody else wrote, such as a server's answer, without whatever `redacted` hides of a URL."""
    parts = urlsplit(url)
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    secrets = {user, password, parts.query, parts.fragment, *(value for _, value in parse_qsl(parts.query))}
    if parts.scheme in ("rtmp", "rtmps"):
        key = parts.path.rstrip("/").rpartition("/")[2]
        secrets |= {key, f"{key}?{parts.query}"}
    secrets |= {unquote(secret) for secret in secrets}
    text = text.replace(url, redacted(url))
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        # As a word of its own: a key may be as short as "a".
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)
    return text
