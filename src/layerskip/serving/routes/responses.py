"""`/v1/responses`: answers of which nothing is kept."""

import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from layerskip.decoding.output.events import GenerationResult
from layerskip.decoding.rules.logprobs import TokenLogprobs
from layerskip.serving.conversation.items import input_messages, response_tools
from layerskip.serving.conversation.turn import AnswerFormat, Turn
from layerskip.serving.protocol.bodies import FINISH_REASONS, metrics, usage
from layerskip.serving.protocol.errors import ApiError, api_error
from layerskip.serving.protocol.logprobs import chat_logprobs
from layerskip.serving.protocol.options import Wanted, wanted
from layerskip.serving.protocol.responses import ResponsesBody
from layerskip.serving.routes.answer import EventStream, all_ends, begin
from layerskip.serving.routes.depends import ServiceOf, origin_of
from layerskip.serving.routes.response_events import ResponseWriter
from layerskip.serving.service import Service
from layerskip.serving.ticket import Delivery, JobEnd, JobFailure

LOGPROBS = "message.output_text.logprobs"
"""Of `include`: log-probabilities are wanted."""
router = APIRouter(tags=["OpenAI"])


@router.post("/v1/responses", summary="Answer, keeping nothing")
async def respond(body: ResponsesBody, http: Request, service: ServiceOf) -> Response:
    """The next items of a conversation that the request brings along whole."""
    service.check_model(body.model)
    check_stateless(body)
    tools = response_tools(body, service.config.limits)
    form = answer_format(body)
    turn = await service.aside(
        lambda: service.conversations.turn(input_messages(body.input, body.instructions), tools=tools, answer=form),
        compiles=form is not None or tools is not None,
    )
    has_logprobs = LOGPROBS in (body.include or ()) or bool(body.top_logprobs)
    asked = wanted(
        body,
        service.config.limits,
        max_tokens=body.max_output_tokens or service.room_after(turn.prompt, "input"),
        logprobs=(body.top_logprobs or 0) if has_logprobs else None,
        vocab_size=service.lm.config.vocab_size,
    )
    requests = turn.constrained(service.requests([turn.prompt], asked, "input"))
    answer = _Answer(service, body, asked, turn)
    ticket = service.submit(requests, asked, origin_of(http, body, answer.id, "chat"), shown=turn.shown)
    if asked.stream:
        events = answer.events(await begin(http, service.scheduler, ticket))
        return EventStream(events, lambda: service.scheduler.cancel(ticket))
    (end,) = await all_ends(http, service.scheduler, ticket)
    return JSONResponse(answer.whole(end))


def check_stateless(body: ResponsesBody) -> None:
    """Raise `ApiError` if a request builds upon something that would have to be kept here."""
    kept = {
        "previous_response_id": "send the conversation so far as input",
        "conversation": "send the conversation so far as input",
        "background": "wait for the answer, or stream it",
        "prompt": "send its text as instructions and input",
    }
    for name, fix in kept.items():
        if getattr(body, name) not in (None, False):
            message = f"{name} isn't supported: this server keeps nothing between requests; {fix}"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
    if body.stream_options is not None and body.stream_options.include_drafts:
        message = "include_drafts is for /v1/chat/completions and /v1/completions: responses have no event for drafts"
        raise ApiError(400, message, param="stream_options.include_drafts", code="unsupported_parameter")


def answer_format(body: ResponsesBody) -> AnswerFormat | None:
    """The form that is asked for; None for text.

    Raises:
        ApiError: There is no schema where one is announced.
    """
    given = None if body.text is None else body.text.format
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return AnswerFormat(schema={"type": "object"}, param="text.format")
    if given.schema_ is None:
        message = "text.format of type json_schema needs a schema"
        raise ApiError(400, message, param="text.format.schema", code="missing_required_parameter")
    return AnswerFormat(schema=given.schema_, param="text.format.schema")


class _Answer:
    """The bodies of one answer."""

    def __init__(self, service: Service, body: ResponsesBody, asked: Wanted, turn: Turn) -> None:
        self._tokenizer, self._asked, self._turn = service.lm.text_tokenizer, asked, turn
        self._writer = ResponseWriter()
        self.id = f"resp_{uuid4().hex}"
        self._fixed = {"id": self.id, **_fixed(body, service.name, asked)}

    def whole(self, end: JobEnd) -> dict[str, Any]:
        """The answer at once."""
        parser, result = self._turn.parser(), end.result
        found = [*parser.push(result.text), *parser.finish()]
        self._writer.add(found, self._logprobs(result.token_ids, result.logprobs or ()))
        self._writer.finish("incomplete" if parser.is_open else status_of(result))
        return self._ended(result)

    async def events(self, deliveries: AsyncIterator[Delivery]) -> AsyncIterator[bytes]:
        """The answer as it comes."""
        parser, writer = self._turn.parser(), self._writer
        begun = self._response("in_progress")
        yield _sse(writer.event("created", response=begun))
        yield _sse(writer.event("in_progress", response=begun))
        async for delivery in deliveries:
            if isinstance(delivery, JobFailure):
                error = {"code": "server_error", "message": api_error(delivery.error).message}
                yield _sse(writer.event("failed", response=self._response("failed", error=error)))
                break
            found = parser.push(delivery.text)
            if isinstance(delivery, JobEnd):
                events = writer.add([*found, *parser.finish()])
                events += writer.finish("incomplete" if parser.is_open else status_of(delivery.result))
                ended = self._ended(delivery.result)
                events.append(writer.event(ended["status"], response=ended))
            else:
                scores = [token.logprobs for token in delivery.tokens if token.logprobs is not None]
                tokens = [token.token_id for token in delivery.tokens]
                events = writer.add(found, self._logprobs(tokens, scores))
            for event in events:
                yield _sse(event)

    def _ended(self, result: GenerationResult) -> dict[str, Any]:
        status = status_of(result)
        reason = None if status == "completed" else {"reason": "max_output_tokens"}
        counted = usage([result])
        return {
            **self._response(status),
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": reason,
            "usage": {
                "input_tokens": counted["prompt_tokens"],
                "input_tokens_details": counted["prompt_tokens_details"],
                "output_tokens": counted["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counted["total_tokens"],
            },
            "metrics": metrics([result]),
        }

    def _response(self, status: str, error: dict[str, Any] | None = None) -> dict[str, Any]:
        return {**self._fixed, "status": status, "error": error, "output": list(self._writer.output)}

    def _logprobs(self, tokens: Sequence[int], found: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        """An entry for each token; none if they aren't asked for."""
        if self._asked.num_logprobs is None:
            return []
        entries: list[dict[str, Any]] = chat_logprobs(self._tokenizer, tokens, found)["content"]
        return entries


def status_of(result: GenerationResult) -> str:
    """OpenAI's name for how an answer has ended."""
    return "completed" if FINISH_REASONS[result.finish_reason] == "stop" else "incomplete"


def _fixed(body: ResponsesBody, model: str, asked: Wanted) -> dict[str, Any]:
    """What a response says from its beginning to its end."""
    told = body.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"input"})
    return {
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "model": model,
        "background": False,
        "conversation": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": told.get("prompt_cache_key"),
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": told.get("safety_identifier"),
        "service_tier": "default",
        "store": False,
        "temperature": asked.config.temperature,
        "text": {"format": told.get("text", {}).get("format", {"type": "text"})},
        "tool_choice": told.get("tool_choice", "auto"),
        "tools": [tool for tool in told.get("tools", []) if tool.get("type") == "function"],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": asked.config.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _sse(event: dict[str, Any]) -> bytes:
    """A server-sent event with its name, in ASCII."""
    return f"event: {event['type']}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n".encode()
