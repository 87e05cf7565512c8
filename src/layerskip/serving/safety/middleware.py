"""What every request passes before a route sees it: host and origin, the key, and the body's size, time and form."""

import asyncio
import ipaddress
import json
import logging
from collections.abc import MutableMapping
from typing import Any

from pydantic_core import from_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from layerskip.serving.config import ServerConfig
from layerskip.serving.playground import POLICY
from layerskip.serving.protocol.errors import ApiError
from layerskip.serving.safety.keys import Keys

log = logging.getLogger("layerskip.serving")
OPEN_PATHS = ("/health",)
"""Routes that need no key."""
DRAINED = 8
"""Times the allowed length of a body up to which one that is too long is read, and dropped."""
PAGE_HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class Gate:
    """Refuses what must not reach the routes, and reads the bodies of the others."""

    def __init__(self, app: ASGIApp, config: ServerConfig, keys: Keys | None) -> None:
        """Stand in front of an app.

        Args:
            app: What requests reach that pass.
            config: Hosts and limits.
            keys: The keys that clients must use; none: no key is asked for.
        """
        self._app, self._config, self._keys = app, config, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":  # there are none
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        try:
            headers = _headers(scope)
            self._check_host(headers)
            self._check_key(scope, headers)
            receive = await self._read_body(scope, headers, receive)
        except ApiError as error:
            await refuse(send, error)
            return
        try:
            await self._app(scope, receive, _guarded(send, self._config.limits.send_seconds))
        except TimeoutError:  # a client that doesn't read what it asked for; its connection is closed
            log.info("a client took longer than %g s to receive its answer", self._config.limits.send_seconds)

    def _check_host(self, headers: MutableMapping[bytes, bytes]) -> None:
        """Without a key, pages of other sites must not be able to ask in a visitor's name."""
        host, origin = headers.get(b"host", b"").decode("latin-1"), headers.get(b"origin")
        if self._keys is None and not self._is_known(_name(host)):
            raise ApiError(
                403,
                f"the Host {host[:100]!r} is not this server's; call it by its address, or name it at the server's "
                "start (--allowed-host)",
                code="host_not_allowed",
            )
        if origin is not None and origin.decode("latin-1").partition("://")[2] != host:
            raise ApiError(403, "requests from the pages of other sites are not answered", code="origin_not_allowed")

    def _is_known(self, name: str) -> bool:
        if name in ("localhost", self._config.host.strip("[]"), *self._config.allowed_hosts):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._config.is_local  # an address can't be given to another one by DNS

    def _check_key(self, scope: Scope, headers: MutableMapping[bytes, bytes]) -> None:
        if self._keys is None or scope["path"] in OPEN_PATHS or self._keys.admit(headers.get(b"authorization")):
            return
        raise ApiError(
            401,
            "a key is needed, and the one that was given is not known: send it as 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": 'Basic realm="layerskip", charset="UTF-8"'},
        )

    async def _read_body(self, scope: Scope, headers: MutableMapping[bytes, bytes], receive: Receive) -> Receive:
        """Read a body within its limits; what the app receives then is this body."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        limits = self._config.limits
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > DRAINED * limits.body_bytes:
            raise _too_large(limits.body_bytes)
        try:
            async with asyncio.timeout(limits.body_seconds):
                body = await _whole(receive, limits.body_bytes)
        except TimeoutError:
            message = f"the body did not arrive within {limits.body_seconds:g} s"
            raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from None
        if body is None:  # the client has gone
            raise ApiError(400, "the body is incomplete", code="invalid_body")
        _check_json(headers, body, limits.nesting)
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replay


async def refuse(send: Send, error: ApiError) -> None:
    """Send an error instead of an answer."""
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _whole(receive: Receive, most: int) -> bytes | None:
    """A body; None if the client goes away first.

    One that is a little too long is read to its end: clients that are still sending wouldn't see the answer.
    """
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size <= most:
            parts.append(part)
        if size > DRAINED * most or (size > most and not message.get("more_body", False)):
            raise _too_large(most)
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large(most: int) -> ApiError:
    message = f"the body has more than {most} bytes; send less at once"
    return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


def _check_json(headers: MutableMapping[bytes, bytes], body: bytes, nesting: int) -> None:
    """Refuse what isn't JSON, before anything else reads it."""
    kind = headers.get(b"content-type", b"application/json").split(b";")[0].strip().lower()
    if kind not in (b"application/json", b""):
        message = f"the body must be JSON (Content-Type: application/json), got {kind.decode('latin-1')[:80]!r}"
        raise ApiError(415, message, code="unsupported_media_type")
    try:
        value = from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        message = f"the body isn't JSON: {str(error)[:200]}"
        raise ApiError(400, message, code="invalid_json") from None
    if _depth_exceeds(value, nesting):
        message = f"the body has more than {nesting} levels of lists and objects"
        raise ApiError(400, message, code="invalid_json")


def _depth_exceeds(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most + 1):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _headers(scope: Scope) -> dict[bytes, bytes]:
    """Headers by name; of several with one name the first."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        found.setdefault(name, value)
    return found


def _name(host: str) -> str:
    """The name or address in a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def _guarded(send: Send, seconds: float) -> Send:
    """Add the headers that keep a browser from doing more with an answer than showing it, and wait no longer than that.

    Args:
        send: Sends a part of an answer.
        seconds: Time that a client may take to receive one.
    """

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *PAGE_HEADERS]
        async with asyncio.timeout(seconds):
            await send(message)

    return sending
