"""Which addresses of a network may be called on behalf of somebody else, and a way to call exactly those."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import httpx

from service.commands import Refusal

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""A name and a port to addresses, as texts. Raises: OSError: there are none."""

Standing = Literal["public", "private", "never"]

TRIED = 4
"""Addresses of one name that are tried, one after the other."""

_LOOK_UPS = 16


def _networks(*texts: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(map(ipaddress.ip_network, texts))


# Written out rather than asked of `ipaddress`, whose answers differ from one patch of Python to the next.
_PRIVATE = _networks(
    *("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "198.18.0.0/15"),
    *("::1/128", "fc00::/7"),
)
_NEVER = _networks(
    *("0.0.0.0/8", "169.254.0.0/16", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "198.51.100.0/24"),
    *("203.0.113.0/24", "224.0.0.0/3"),
    # Teredo, ORCHID, benchmarks; documentation; 6to4, which carries an IPv4 address that nobody looked at.
    *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    # Where clouds answer their own machines with credentials, beside 169.254.169.254.
    *("168.63.129.16/32", "100.100.100.200/32", "fd00:ec2::254/128", "fd20:ce::254/128"),
)
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def standing(address: str) -> Standing:
    """What kind of address it is: of the open internet, of a private network (this machine's own loopback included), or
    one that is nobody's to call: unspecified, link-local, multicast, reserved, a cloud's metadata.

    An IPv4 address within an IPv6 one (mapped, NAT64) counts as itself.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return "never"
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip)
    if any(ip in network for network in _NEVER):
        return "never"
    if any(ip in network for network in _PRIVATE):
        return "private"
    return "never" if ip.version == 6 and ip not in _PUBLIC_V6 else "public"


_look_ups = ThreadPoolExecutor(_LOOK_UPS, thread_name_prefix="look up")


async def look_up(host: str, port: int) -> list[str]:
    """What the system's resolver says; it may take long, so whoever waits sets a limit. Raises: OSError."""
    # In threads of its own: a name server that never answers must not take those that everybody shares.
    loop = asyncio.get_running_loop()
    found = await loop.run_in_executor(_look_ups, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    return list(dict.fromkeys(str(answer[4][0]) for answer in found))


async def allowed_addresses(
    host: str, port: int, shown: str, *, private: bool, resolve: Resolve = look_up
) -> Sequence[str]:
    """The addresses of a host, every one of which may be called; `shown` is what is said in their place.

    private: whether private networks are allowed. One address that is not allowed among several refuses them all: an
    honest name has none. The answer says nothing of what a name stands for inside of a private network.
    Raises: Refusal: forbidden, or invalid when there is no such host.
    """
    try:
        addresses = await resolve(host, port)
    except (OSError, UnicodeError) as error:
        raise Refusal("invalid", f"{shown}: there is no host of that name; check the address") from error
    found = {standing(address) for address in addresses}
    if "never" in found or not found:
        raise Refusal("forbidden", f"{shown}: leads to an address that is not called from here; use a public one")
    if "private" in found and not private:
        raise Refusal("forbidden", f"{shown}: leads into a private network, which is not allowed here")
    return addresses


class CheckedTransport(httpx.AsyncBaseTransport):
    """Calls only addresses that `allowed` gives for a host and a port, and looks a name up once for each request.

    The connection is made to the very address that was judged, so a name that means something else a moment later
    gains nothing; Host and the name in the TLS handshake stay those of the URL. No proxies, no kept connections: one
    that is kept for an address would be used for another name.
    """

    def __init__(self, allowed: Callable[[str, int], Awaitable[Sequence[str]]], inner: httpx.AsyncBaseTransport):
        self._allowed, self._inner = allowed, inner

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host = request.url.raw_host.decode("ascii")
        port = request.url.port or {"http": 80, "https": 443}[request.url.scheme]
        failed: httpx.TransportError | None = None
        for address in (await self._allowed(host, port))[:TRIED]:
            pinned = httpx.Request(
                request.method,
                request.url.copy_with(host=address),
                headers=request.headers,
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": host.rstrip(".")},
            )
            try:
                return await self._inner.handle_async_request(pinned)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failed = error
        assert failed is not None, "a host without addresses is refused"
        raise failed

    async def aclose(self) -> None:
        await self._inner.aclose()
