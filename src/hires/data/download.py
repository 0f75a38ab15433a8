"""Fetch from web addresses that others wrote: http and https only, bounded, and nothing in the local network."""

import time
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from ipaddress import ip_address
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
    getproxies,
)

from hires import __version__

LARGEST = 64 << 20  # bytes
IDLE, SECONDS = 30, 120  # without a byte; for the whole content


def fetch(url: str, private: bool = False) -> bytes | None:
    """The content at a web address; None where nothing answers, or more than LARGEST bytes or SECONDS.

    Redirects are followed to http and https only. `private`: ask addresses of the local network too; behind a proxy,
    which names none, the proxy decides.
    """
    proxied = bool({"http", "https", "all"} & getproxies().keys())
    opener = OpenerDirector()
    web = (HTTPHandler(), HTTPSHandler()) if private or proxied else (_PublicHandler(), _PublicTLSHandler())
    rules = ProxyHandler(), UnknownHandler(), HTTPDefaultErrorHandler(), HTTPRedirectHandler(), HTTPErrorProcessor()
    for handler in (*rules, *web):
        opener.add_handler(handler)
    until = time.monotonic() + SECONDS
    try:
        with opener.open(Request(url, headers={"User-Agent": f"hires/{__version__}"}), timeout=IDLE) as answer:
            content = bytearray()
            while part := answer.read1(1 << 20):
                content += part
                if len(content) > LARGEST or time.monotonic() > until:
                    return None
            return bytes(content)
    except (OSError, ValueError, HTTPException):  # no answer, no such address, none at all
        return None


class _Public(HTTPConnection):
    """Says nothing to an address that isn't public, whatever its name resolved to."""

    def connect(self) -> None:
        super().connect()
        address = ip_address(self.sock.getpeername()[0])
        if not (getattr(address, "ipv4_mapped", None) or address).is_global:
            self.close()
            raise ConnectionRefusedError(f"{self.host} is {address}, in the local network")


class _PublicTLS(HTTPSConnection, _Public):
    """The same, before the TLS handshake."""


class _PublicHandler(HTTPHandler):
    def http_open(self, request: Request) -> HTTPResponse:
        return self.do_open(_Public, request)


class _PublicTLSHandler(HTTPSHandler):
    def https_open(self, request: Request) -> HTTPResponse:
        return self.do_open(_PublicTLS, request)
