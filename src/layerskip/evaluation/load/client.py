"""A client of servers that speak OpenAI's protocol: the list of models, and streamed answers with their times."""

import re
from collections.abc import Mapping
from contextlib import suppress
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from layerskip.errors import InvalidArgumentError, LayerSkipError, brief
from layerskip.evaluation.load.answer import Answer, AnswerError, error_message
from layerskip.evaluation.load.sse import EventParser
from layerskip.files import parse_json

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS = 10.0
MODELS_SECONDS = 30.0
"""Without a byte of the list of models after which there is no server."""
MOST_OF_AN_ERROR = 64 * 1024
"""Bytes of an error's body that are read."""
REFUSES_KEY = (401, 403)


class ServerError(LayerSkipError):
    """A server that doesn't answer, isn't one of OpenAI's protocol, or refuses."""


def base_address(url: str) -> str:
    """The address in front of /v1, without a slash at its end.

    Args:
        url: As a user gives it, with /v1 or without.

    Raises:
        InvalidArgumentError: It is no address of a server.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment or parts.username is not None:
        raise InvalidArgumentError(f"url must be a server's address such as http://127.0.0.1:8000, got {url!r}")
    return re.sub(r"/v1$", "", url.rstrip("/"))


class Client:
    """Connections to a server; used with `async with`."""

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 600.0) -> None:
        """Open nothing yet.

        Args:
            url: The server's address.
            key: Sent as a bearer token, if given.
            timeout: Seconds without a byte after which a request is given up.

        Raises:
            InvalidArgumentError: The address can't be one, or the library for HTTP isn't installed.
        """
        try:
            import httpx
        except ImportError as error:
            raise InvalidArgumentError("bench-serve needs the package httpx: pip install 'layerskip[serve]'") from error
        self.address = base_address(url)
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._httpx = httpx
        self._client: httpx.AsyncClient = httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            # This machine is never reached through a proxy, whatever the environment says of others.
            mounts=dict.fromkeys(("all://127.0.0.1", "all://localhost", "all://[::1]")),
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """Entries of /v1/models.

        Raises:
            ServerError: There is no server, it isn't one of OpenAI's protocol, or it wants another key.
        """
        place = f"{self.address}/v1/models"
        try:
            response = await self._client.get(place, timeout=MODELS_SECONDS)
        except (self._httpx.HTTPError, self._httpx.InvalidURL) as error:
            raise ServerError(
                f"{self.address} doesn't answer: {self._reason(error)}; is the server running?"
            ) from error
        if response.status_code in REFUSES_KEY:
            said = error_message(_parsed(response.content)) or response.reason_phrase
            raise ServerError(
                f"{self.address} refuses the key (HTTP {response.status_code}: {said}); give --api-key-file FILE, or "
                "set LAYERSKIP_API_KEY or OPENAI_API_KEY"
            )
        content = _parsed(response.content)
        entries = content.get("data") if isinstance(content, dict) else None
        named = [entry for entry in entries or [] if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
        if response.status_code != 200 or not named:
            said = f"HTTP {response.status_code}" if response.status_code != 200 else "without a list of models"
            raise ServerError(
                f"{self.address} isn't a server of OpenAI's protocol: {place} answers {said}; check the address, or "
                "name the model (--model)"
            )
        return named

    async def send(self, path: str, body: Mapping[str, Any], answer: Answer) -> float:
        """Send a request, and read the stream of its answer to the end.

        Args:
            path: Path of the endpoint.
            body: Its JSON.
            answer: Takes what arrives.

        Returns:
            Seconds until the end.

        Raises:
            AnswerError: No answer, or not a whole one.
        """
        began, parser = perf_counter(), EventParser()
        try:
            async with self._client.stream("POST", self.address + path, json=dict(body)) as response:
                if response.status_code != 200:
                    raise await _refusal(response)
                kind = response.headers.get("content-type", "").partition(";")[0].strip()
                if kind != "text/event-stream":
                    raise AnswerError("not a stream", f"the answer is {kind or 'of no type'}, not text/event-stream")
                async for content in response.aiter_bytes():
                    now = perf_counter() - began
                    for data in parser.push(content):
                        answer.take(data, now)
                    if answer.done:
                        break
        except self._httpx.TimeoutException as error:
            raise AnswerError("timeout", self._reason(error)) from error
        except self._httpx.ConnectError as error:
            raise AnswerError("no connection", self._reason(error)) from error
        except self._httpx.HTTPError as error:
            raise AnswerError("connection lost", self._reason(error)) from error
        if not answer.done and answer.finish_reason is None:
            raise AnswerError("connection lost", "the stream ended before the answer did")
        return perf_counter() - began

    def _reason(self, error: Exception) -> str:
        if isinstance(error, self._httpx.TimeoutException):
            return f"no answer in time ({type(error).__name__})"
        return brief(error)


async def _refusal(response: "httpx.Response") -> AnswerError:
    """What an answer with another status than 200 says."""
    content = b""
    async for part in response.aiter_bytes():
        content += part
        if len(content) > MOST_OF_AN_ERROR:
            break
    said = error_message(_parsed(content)) or " ".join(content[:200].decode("utf-8", "replace").split())
    retry_after = None
    with suppress(ValueError):  # a date, which no such server sends
        retry_after = max(0.0, float(response.headers.get("retry-after", "")))
    status = response.status_code
    return AnswerError(f"HTTP {status}", said or response.reason_phrase, retry_after=retry_after)


def _parsed(content: bytes) -> Any:
    try:
        return parse_json(content)
    except ValueError:
        return None
