"""Who may use the server: keys, web pages of other origins, and names of this machine.

A page in a browser reaches servers of its machine too. Requests of pages from elsewhere are refused, and so are those
that a name from elsewhere leads here (DNS rebinding), with which a page looks like one of this server.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from dataclasses import dataclass
from email.message import Message
from urllib.parse import SplitResult, urlsplit

from tq.engine.run.serve.body import RequestError

PUBLIC_PATHS = ("/", "/health")  # for balancers, without a key
LOCAL_SUFFIXES = (".localhost", ".local", ".internal")  # Docker calls its host host.docker.internal
ANY = "*"


@dataclass(frozen=True)
class Access:
    """The rules of one server.

    Attributes:
        api_key: What clients must send; None: nothing.
        origins: Of web pages that may use the server beside those of this machine; "*" is any.
        is_local: Only this machine can connect.
    """

    api_key: str | None = None
    origins: tuple[str, ...] = ()
    is_local: bool = True

    def admit(self, method: str, path: str, headers: Message) -> None:
        """Let a request in.

        Raises:
            RequestError: This client may not ask, or not here.
        """
        origin, host = headers.get("Origin"), headers.get("Host", "")
        if origin is not None and not self._is_welcome(origin, host):
            raise RequestError(
                f"web pages of {origin} may not use this server; tq serve --allow-origin {origin} lets them",
                status=403,
                code="origin_not_allowed",
            )
        if self.api_key is None:
            if self.is_local and not _is_local_name(host):
                raise RequestError(
                    f"{host} is no name of this machine; tq serve --host opens the server to others",
                    status=403,
                    code="host_not_allowed",
                )
        elif method != "OPTIONS" and path not in PUBLIC_PATHS and not self._has_key(self.api_key, headers):
            raise RequestError(
                "the API key is missing or wrong: send Authorization: Bearer KEY, or x-api-key: KEY",
                status=401,
                code="invalid_api_key",
            )

    def headers(self, method: str, headers: Message) -> dict[str, str]:
        """What tells a browser that its page may read the response (https://fetch.spec.whatwg.org, CORS)."""
        origin = headers.get("Origin")
        if origin is None or not self._is_welcome(origin, headers.get("Host", "")):
            return {}
        allowed = {
            "Access-Control-Allow-Origin": ANY if ANY in self.origins else origin,
            "Access-Control-Expose-Headers": "x-request-id",
            "Vary": "Origin",
        }
        if method == "OPTIONS":
            allowed |= {
                "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
                "Access-Control-Allow-Headers": " ".join(headers.get("Access-Control-Request-Headers", ANY).split()),
                "Access-Control-Max-Age": "86400",
            }
        return allowed

    def _has_key(self, key: str, headers: Message) -> bool:
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        given = (bearer, headers.get("x-api-key", ""))
        # Headers are read as Latin-1, whatever bytes they have.
        return any(hmac.compare_digest(one.encode("latin-1", "replace"), key.encode()) for one in given)

    def _is_welcome(self, origin: str, host: str) -> bool:
        if ANY in self.origins or origin in self.origins:
            return True
        page = _split(origin)
        return page.scheme in ("http", "https") and (
            page.netloc == host or _is_loopback(page.hostname or "")  # this server's own pages, or this machine's
        )


def _split(url: str) -> SplitResult:
    """`urlsplit`, where nonsense is a URL without any part."""
    try:
        found = urlsplit(url)
        _ = found.hostname, found.port
        return found
    except ValueError:
        return SplitResult("", "", "", "", "")


def _is_local_name(host: str) -> bool:
    """Whether a Host header names this machine. Browsers always send one; who sends none is no page."""
    name = (_split(f"//{host}").hostname or "").rstrip(".")
    known = ("localhost", socket.gethostname().lower())
    return not host or name in known or name.endswith(LOCAL_SUFFIXES) or _is_address(name)


def _is_loopback(name: str) -> bool:
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
