"""What is checked of every request before anything looks at it, and what every answer says to browsers."""

import base64
import hashlib
import ipaddress
import re
import socket
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hpr_jax.serving.refusal import Refusal


def own_names() -> set[str]:
    """The names by which a browser may call this machine; no other machine is asked for them."""
    return {"localhost", socket.gethostname().lower()}


class Guard:
    """Refuses requests that web pages of others send through a user's browser, and tells browsers what the page may do.

    A page of a stranger can make a browser send it requests to this machine. Under a name of its own, which it lets point to
    this machine (DNS rebinding), it could read the answers: so the header Host must have a name of this machine, or an
    address, which cannot be let point elsewhere. Under another name it could make it work: so Origin must be Host.

    Args:
      names: of this machine.
      policy: Content-Security-Policy of all answers.
    """

    def __init__(self, app: ASGIApp, names: Collection[str], policy: str):
        self._app, self._names = app, names
        self._headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        try:
            self._check(Headers(scope=scope))
        except Refusal as refusal:
            await refusal.response()(scope, receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)

    def _check(self, headers: Headers) -> None:
        host = headers.get("host", "")
        name = _name(host)
        if not (name in self._names or _is_address(name)):
            raise Refusal(421, f"This server is not {name[:80]!r}; `serve --allow-host NAME` gives it another name.")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise Refusal(403, "Pages of other servers may not use this one.")
        if headers.get("sec-fetch-site", "none") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            raise Refusal(403, "Pages of other servers may not use this one.")


def _name(host: str) -> str:
    """The name or the address in a header Host, without its port."""
    return re.sub(r":\d*$", "", host).strip("[]").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def policy_of(page: str) -> str:
    """The Content-Security-Policy of a page: its own style and script run, by their digests, and nothing else."""

    def digests(tag: str) -> str:
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
