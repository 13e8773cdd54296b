"""Who may do what over HTTP: bearer tokens with scopes, and limits on how often anybody may ask or guess."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from limits import RateLimitItemPerMinute
from limits.storage import Storage
from limits.strategies import FixedWindowRateLimiter

from service.commands import Refusal
from service.config import ConfigError, Settings
from service.secrets import read_secret

Scope = Literal["read", "jobs", "live", "admin"]

IMPLIED: dict[Scope, frozenset[Scope]] = {
    "read": frozenset({"read"}),
    "jobs": frozenset({"read", "jobs"}),
    "live": frozenset({"read", "live"}),
    "admin": frozenset({"read", "jobs", "live", "admin"}),
}
"""What each scope allows."""

LEAST_CHARACTERS = 16

MOST_COUNTED = 10_000
"""Tokens and addresses that are counted at once; beyond them, whoever began to be counted first is forgotten."""


@dataclass(frozen=True)
class Principal:
    """Somebody who asks: under which name they are known in logs, and everything they may do."""

    name: str
    scopes: frozenset[Scope]

    def require(self, scope: Scope) -> None:
        """Raises: Refusal: forbidden."""
        if scope not in self.scopes:
            raise Refusal(
                "forbidden", f"token {self.name} has no scope {scope}; it has {', '.join(sorted(self.scopes))}"
            )


@dataclass(frozen=True)
class _Token:
    digest: bytes = field(repr=False)
    principal: Principal


class Keys:
    """The tokens of the settings, as digests; use `load`.

    Without any, everybody who reaches the server may do everything: it then listens on loopback alone.
    """

    def __init__(
        self,
        tokens: tuple[_Token, ...],
        requests_per_minute: int,
        failures_per_minute: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tokens = tokens
        # Apart, so that a crowd of askers does not make the guessers be forgotten.
        self._requests = _Limit(requests_per_minute, "requests", clock)
        self._failures = _Limit(failures_per_minute, "wrong tokens", clock)

    @classmethod
    def load(cls, settings: Settings, clock: Callable[[], float] = time.monotonic) -> Keys:
        """Read the tokens from their files and variables.

        Raises: ConfigError: a token that is missing, empty, short, given twice or readable for everybody; or none,
        though the server listens elsewhere than on loopback.
        """
        tokens: list[_Token] = []
        for section in settings.auth.tokens:
            setting = f"auth.tokens: {section.name}"
            text = read_secret(setting, section.file, section.env)
            if not text:
                raise ConfigError(f"{setting}: has no text; name a file or env that holds it")
            if len(text) < LEAST_CHARACTERS:
                raise ConfigError(
                    f"{setting}: has {len(text)} characters, at least {LEAST_CHARACTERS} are needed; "
                    "openssl rand -hex 24 makes one"
                )
            if not section.scopes:
                raise ConfigError(f"{setting}: has no scopes; give it some of {', '.join(IMPLIED)}")
            token = _Token(
                _digest(text),
                Principal(section.name, frozenset[Scope]().union(*(IMPLIED[scope] for scope in section.scopes))),
            )
            for other in tokens:
                if other.principal.name == section.name:
                    raise ConfigError(f"{setting}: stands there twice; give each token a name of its own")
                if other.digest == token.digest:
                    raise ConfigError(f"{setting}: is the same token as {other.principal.name}; make a new one")
            tokens.append(token)
        if not tokens and settings.http.enabled and not is_loopback(settings.http.host):
            raise ConfigError(
                f"http.host: {settings.http.host} can be reached from other machines, and there is no token; "
                "list one in auth.tokens, or use 127.0.0.1"
            )
        return cls(tuple(tokens), settings.auth.requests_per_minute, settings.auth.failures_per_minute, clock)

    @property
    def required(self) -> bool:
        """Whether a token is asked for."""
        return bool(self._tokens)

    def identify(self, token: str | None, address: str) -> Principal:
        """Whose token that is; counts the request.

        token: its bare text, None when none was sent; address: whence it came, for the limits.
        Raises: Refusal: unauthorised; busy, with retry_s, when this token (or address, without tokens) asked too
        often, or this address guessed too often: then no token is looked at, not even a right one.
        """
        place = f"address {_place(address)}"
        if not self._tokens:
            self._requests.count(place)
            return Principal("local", IMPLIED["admin"])
        self._failures.check(place)
        if not token:
            self._requests.count(place)
            raise Refusal("unauthorised", "a token is needed; send Authorization: Bearer TOKEN")
        principal = self._find(token)
        if principal is None:
            self._failures.count(place)
            raise Refusal("unauthorised", "this token is not known here; check it")
        self._requests.count(f"token {principal.name}")
        return principal

    def _find(self, token: str) -> Principal | None:
        """Compared with all of them, each in constant time, so that its duration tells nothing."""
        digest, found = _digest(token), None
        for known in self._tokens:
            if hmac.compare_digest(known.digest, digest):
                found = known.principal
        return found


class _Limit:
    """So many a minute, for each name."""

    def __init__(self, per_minute: int, what: str, clock: Callable[[], float]) -> None:
        self._limit, self._what = RateLimitItemPerMinute(per_minute), what
        self._counts = _Counts(clock)
        self._limiter = FixedWindowRateLimiter(self._counts)

    def count(self, name: str) -> None:
        """One more. Raises: Refusal: busy: it was one too many."""
        if not self._limiter.hit(self._limit, name):
            raise self._refusal(name)

    def check(self, name: str) -> None:
        """Raises: Refusal: busy: one more would be too many."""
        if not self._limiter.test(self._limit, name):
            raise self._refusal(name)

    def _refusal(self, name: str) -> Refusal:
        retry_s = max(self._counts.left_s(self._limit.key_for(name)), 1.0)
        what = f"more than {self._limit.amount} {self._what} in a minute"
        return Refusal("busy", f"{what}; come again in {retry_s:.0f} s", retry_s)


class _Counts(Storage):
    """What `limits` counts, in memory: no more than MOST_COUNTED names, and by a clock that nobody sets back.

    Its own store in memory has no bound, trusts the time of day, and starts a thread for nearly every request.
    """

    STORAGE_SCHEME = None

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        # Each with its count and when it ends; in the order in which they began, so also in which they end.
        self._counts: OrderedDict[str, tuple[int, float]] = OrderedDict()

    @property
    def base_exceptions(self) -> type[Exception]:
        return ValueError

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        now = self._clock()
        while self._counts and next(iter(self._counts.values()))[1] <= now:
            self._counts.popitem(last=False)
        count, ends = self._counts.get(key, (0, now + expiry))
        self._counts[key] = count + amount, ends
        if len(self._counts) > MOST_COUNTED:
            self._counts.popitem(last=False)
        return count + amount

    def get(self, key: str) -> int:
        count, ends = self._counts.get(key, (0, 0.0))
        return count if ends > self._clock() else 0

    def get_expiry(self, key: str) -> float:
        return self._counts.get(key, (0, self._clock()))[1]

    def left_s(self, key: str) -> float:
        """Seconds until a name is counted from nothing again."""
        return self.get_expiry(key) - self._clock()

    def check(self) -> bool:
        return True

    def reset(self) -> int:
        count = len(self._counts)
        self._counts.clear()
        return count

    def clear(self, key: str) -> None:
        self._counts.pop(key, None)


def is_loopback(host: str) -> bool:
    """Whether what listens there can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _digest(token: str) -> bytes:
    """Of one length, whatever is sent: a comparison then tells nothing about the length of a token either."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _place(address: str) -> str:
    """Whose address it is: of IPv6 the first half, since one customer has all of the second."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((int(ip) >> 64 << 64, 64)))
    return str(ip)
