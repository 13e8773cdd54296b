"""URLs as they may be shown: stream keys, passwords and tokens are for the other end alone."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote, urlsplit

HIDDEN = "***"
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def redacted(url: str) -> str:
    """A URL without user, password, query and fragment, and without an RTMP URL's last part, which is its key.

    In one line, whatever it holds. What is no URL stays as it is: a path, a device. Where it cannot be told for sure
    which part is which, nothing but the scheme is shown.
    """
    url = _UNPRINTABLE.sub("?", url)
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    try:
        # librtmp takes options behind a blank, such as playpath=KEY.
        parts = urlsplit(url.split(" ", 1)[0])
    except ValueError:
        return f"{scheme}://{HIDDEN}"
    _, at, host = parts.netloc.rpartition("@")
    keyed = parts.scheme in ("rtmp", "rtmps")
    if "@" in rest[len(parts.netloc) :] and (keyed or not (at or re.fullmatch(r"(\[.*\]|[^:]*)(:\d*)?", host))):
        # A slash, a question mark or a hash within the password: what seems to be the host is a part of it.
        return f"{scheme}://{HIDDEN}"
    path = parts.path
    if keyed:
        before, _, key = path.rstrip("/").rpartition("/")
        path = f"{before}/{HIDDEN}" if key else path
    shown = f"{scheme}://{HIDDEN + at if at else ''}{host}{path}"
    return f"{shown}?{HIDDEN}" if parts.query or parts.fragment or " " in url else shown


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
