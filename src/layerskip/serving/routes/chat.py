"""`/v1/chat/completions`: conversations."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from layerskip.decoding.output.events import GenerationResult, TokenEvent
from layerskip.serving.conversation.deltas import Arguments, CallStart, Content, Delta, together
from layerskip.serving.conversation.messages import template_variables, to_messages
from layerskip.serving.conversation.parser import CallParser, PlainText
from layerskip.serving.conversation.tools import chat_tools
from layerskip.serving.conversation.turn import AnswerFormat, Turn
from layerskip.serving.protocol.bodies import DONE, FINISH_REASONS, metrics, speculation, sse, usage
from layerskip.serving.protocol.errors import ApiError, api_error
from layerskip.serving.protocol.logprobs import chat_logprobs
from layerskip.serving.protocol.options import Wanted, wanted
from layerskip.serving.protocol.requests import ChatBody, ResponseFormat
from layerskip.serving.routes.answer import EventStream, all_ends, begin
from layerskip.serving.routes.depends import ServiceOf, origin_of
from layerskip.serving.service import Service
from layerskip.serving.ticket import Delivery, JobEnd, JobFailure, RoundPiece

router = APIRouter(tags=["OpenAI"])


@router.post("/v1/chat/completions", summary="Answer in a conversation")
async def chat(body: ChatBody, http: Request, service: ServiceOf) -> Response:
    """The assistant's next message."""
    service.check_model(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs need logprobs to be true", param="top_logprobs", code="invalid_value")
    tools = chat_tools(body.tools, body.tool_choice, body.parallel_tool_calls, service.config.limits)
    form, variables = answer_format(body.response_format), template_variables(body.chat_template_kwargs)

    def prepare() -> Turn:
        return service.conversations.turn(to_messages(body.messages), tools=tools, answer=form, variables=variables)

    turn = await service.aside(prepare, compiles=form is not None or tools is not None)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    asked = wanted(
        body,
        service.config.limits,
        max_tokens=limit or service.room_after(turn.prompt, "messages"),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        vocab_size=service.lm.config.vocab_size,
    )
    requests = turn.constrained(service.requests([turn.prompt], asked, "messages"))
    answer = _Answer(service, asked, turn)
    ticket = service.submit(requests, asked, origin_of(http, body, answer.id, "chat"), shown=turn.shown)
    if asked.stream:
        events = answer.events(await begin(http, service.scheduler, ticket))
        return EventStream(events, lambda: service.scheduler.cancel(ticket))
    return JSONResponse(answer.whole(await all_ends(http, service.scheduler, ticket)))


def answer_format(given: ResponseFormat | None) -> AnswerFormat | None:
    """The form that is asked for; None for text.

    Raises:
        ApiError: There is no schema where one is announced.
    """
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return AnswerFormat(schema={"type": "object"}, param="response_format")
    if given.json_schema is None or given.json_schema.schema_ is None:
        message = "response_format of type json_schema needs json_schema.schema"
        raise ApiError(400, message, param="response_format", code="missing_required_parameter")
    return AnswerFormat(schema=given.json_schema.schema_, param="response_format")


class _Answer:
    """The bodies of one answer."""

    def __init__(self, service: Service, asked: Wanted, turn: Turn) -> None:
        self._tokenizer, self._asked, self._turn = service.lm.text_tokenizer, asked, turn
        self.id = f"chatcmpl-{uuid4().hex}"
        self._head = {"id": self.id, "created": int(time.time()), "model": service.name}

    def whole(self, ends: Sequence[JobEnd]) -> dict[str, Any]:
        """The answer at once."""
        results = [end.result for end in ends]
        choices = [self._whole_choice(end) for end in ends]
        counted = usage(results, self._asked.num_choices)
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": counted, "metrics": metrics(results)}

    def _whole_choice(self, end: JobEnd) -> dict[str, Any]:
        parser = self._turn.parser()
        content, calls = together([*parser.push(end.result.text), *parser.finish()])
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["content"] = content or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        return {
            "index": end.place,
            "message": message,
            "logprobs": self._whole_logprobs(end.result),
            "finish_reason": finish_reason(end.result, parser),
        }

    async def events(self, deliveries: AsyncIterator[Delivery]) -> AsyncIterator[bytes]:
        """The answer as it comes."""
        ends: dict[int, JobEnd] = {}
        parsers: dict[int, CallParser | PlainText] = {}
        async for delivery in deliveries:
            if isinstance(delivery, JobFailure):
                yield sse(api_error(delivery.error).body)
                break
            place = delivery.place
            if place not in parsers:
                parsers[place] = self._turn.parser()
                yield sse(self._chunk(place, {"role": "assistant", "content": "", "refusal": None}))
            found = parsers[place].push(delivery.text)
            if isinstance(delivery, RoundPiece):
                chunk = self._piece(delivery, found)
                if chunk is not None:
                    yield sse(chunk)
                continue
            ends[place] = delivery
            found += parsers[place].finish()
            if found:
                yield sse(self._chunk(place, as_delta(found)))
            yield sse(self._chunk(place, {}, finish_reason(delivery.result, parsers[place])))
        else:
            if self._asked.include_usage:
                results = [ends[place].result for place in sorted(ends)]
                counted = {"usage": usage(results, self._asked.num_choices), "metrics": metrics(results)}
                yield sse({**self._head, "object": "chat.completion.chunk", "choices": [], **counted})
        yield DONE

    def _whole_logprobs(self, result: GenerationResult) -> dict[str, Any] | None:
        if self._asked.num_logprobs is None:
            return None
        return chat_logprobs(self._tokenizer, result.token_ids, result.logprobs or ())

    def _piece(self, piece: RoundPiece, found: Sequence[Delta]) -> dict[str, Any] | None:
        logprobs = self._logprobs(piece.tokens)
        if not found and logprobs is None and not self._asked.include_drafts:
            return None
        chunk = self._chunk(piece.place, as_delta(found) or {"content": ""}, logprobs=logprobs)
        if self._asked.include_drafts:
            chunk["speculation"] = speculation(piece)
        return chunk

    def _chunk(
        self, place: int, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": place, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, tokens: Sequence[TokenEvent]) -> dict[str, Any] | None:
        """Log-probabilities of some tokens; None if they aren't asked for."""
        if self._asked.num_logprobs is None:
            return None
        found = [token.logprobs for token in tokens if token.logprobs is not None]
        return chat_logprobs(self._tokenizer, [token.token_id for token in tokens], found)


def as_delta(found: Sequence[Delta]) -> dict[str, Any]:
    """What a round has added, as a chunk's delta: one entry for each call that it begins or goes on with."""
    made: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for delta in found:
        match delta:
            case Content(text=text):
                made["content"] = made.get("content", "") + text
            case CallStart(index=index, id=call_id, name=name):
                function = {"name": name, "arguments": ""}
                calls[index] = {"index": index, "id": call_id, "type": "function", "function": function}
            case Arguments(index=index, text=text):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += text
    return {**made, "tool_calls": list(calls.values())} if calls else made


def finish_reason(result: GenerationResult, parser: CallParser | PlainText) -> str:
    """OpenAI's name for why an answer has ended; a stop string may have ended it within a call."""
    reason = FINISH_REASONS[result.finish_reason]
    return "tool_calls" if parser.num_calls and not parser.is_open and reason == "stop" else reason
