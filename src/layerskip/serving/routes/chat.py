"""`/v1/chat/completions`: conversations."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from layerskip.decoding.output.events import GenerationResult, TokenEvent
from layerskip.serving.protocol.bodies import DONE, FINISH_REASONS, metrics, speculation, sse, usage
from layerskip.serving.protocol.conversation import to_messages
from layerskip.serving.protocol.errors import ApiError, api_error
from layerskip.serving.protocol.logprobs import chat_logprobs
from layerskip.serving.protocol.options import Wanted, wanted
from layerskip.serving.protocol.requests import ChatBody
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
    prompt = await service.aside(lambda: service.lm.encode_chat(to_messages(body.messages)))
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    asked = wanted(
        body,
        service.config.limits,
        max_tokens=limit or service.room_after(prompt, "messages"),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        vocab_size=service.lm.config.vocab_size,
    )
    requests = service.requests([prompt], asked, "messages")
    answer = _Answer(service, asked)
    ticket = service.submit(requests, asked, origin_of(http, body, answer.id, "chat"))
    if asked.stream:
        events = answer.events(await begin(http, service.scheduler, ticket))
        return EventStream(
            events,
            lambda: service.scheduler.cancel(ticket),
            send_seconds=service.config.limits.send_seconds,
        )
    return JSONResponse(answer.whole(await all_ends(http, service.scheduler, ticket)))


class _Answer:
    """The bodies of one answer."""

    def __init__(self, service: Service, asked: Wanted) -> None:
        self._tokenizer, self._asked = service.lm.text_tokenizer, asked
        self.id = f"chatcmpl-{uuid4().hex}"
        self._head = {"id": self.id, "created": int(time.time()), "model": service.name}

    def whole(self, ends: Sequence[JobEnd]) -> dict[str, Any]:
        """The answer at once."""
        results = [end.result for end in ends]
        choices = [
            {
                "index": end.place,
                "message": {"role": "assistant", "content": end.result.text, "refusal": None},
                "logprobs": self._whole_logprobs(end.result),
                "finish_reason": FINISH_REASONS[end.result.finish_reason],
            }
            for end in ends
        ]
        counted = usage(results, self._asked.num_choices)
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": counted, "metrics": metrics(results)}

    async def events(self, deliveries: AsyncIterator[Delivery]) -> AsyncIterator[bytes]:
        """The answer as it comes."""
        ends: dict[int, JobEnd] = {}
        begun: set[int] = set()
        async for delivery in deliveries:
            if isinstance(delivery, JobFailure):
                yield sse(api_error(delivery.error).body)
                break
            if delivery.place not in begun:
                begun.add(delivery.place)
                yield sse(self._chunk(delivery.place, {"role": "assistant", "content": "", "refusal": None}))
            if isinstance(delivery, RoundPiece):
                chunk = self._piece(delivery)
                if chunk is not None:
                    yield sse(chunk)
                continue
            ends[delivery.place] = delivery
            if delivery.text:
                yield sse(self._chunk(delivery.place, {"content": delivery.text}))
            yield sse(self._chunk(delivery.place, {}, FINISH_REASONS[delivery.result.finish_reason]))
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

    def _piece(self, piece: RoundPiece) -> dict[str, Any] | None:
        logprobs = self._logprobs(piece.tokens)
        if not piece.text and logprobs is None and not self._asked.include_drafts:
            return None
        chunk = self._chunk(piece.place, {"content": piece.text}, logprobs=logprobs)
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
