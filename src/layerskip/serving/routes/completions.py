"""`/v1/completions`: texts that are continued."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from layerskip.serving.protocol.bodies import DONE, FINISH_REASONS, metrics, speculation, sse, usage
from layerskip.serving.protocol.errors import ApiError, api_error
from layerskip.serving.protocol.logprobs import CompletionLogprobs
from layerskip.serving.protocol.options import Wanted, wanted
from layerskip.serving.protocol.requests import CompletionBody
from layerskip.serving.routes.answer import EventStream, all_ends, begin
from layerskip.serving.routes.depends import ServiceOf, origin_of
from layerskip.serving.service import Service
from layerskip.serving.ticket import Delivery, JobEnd, JobFailure, RoundPiece

DEFAULT_TOKENS = 16
"""OpenAI's default of `max_tokens`."""
router = APIRouter(tags=["OpenAI"])


@router.post("/v1/completions", summary="Continue texts")
async def complete(body: CompletionBody, http: Request, service: ServiceOf) -> Response:
    """Continue one or several texts, given as text or token ids."""
    service.check_model(body.model)
    if body.suffix:
        raise ApiError(400, "suffix isn't supported; leave it out", param="suffix", code="unsupported_value")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise ApiError(400, "best_of must equal n: all texts are given", param="best_of", code="unsupported_value")
    max_tokens = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise ApiError(400, "max_tokens may be 0 only with echo", param="max_tokens", code="invalid_value")
    asked = wanted(
        body,
        service.config.limits,
        max_tokens=max(1, max_tokens),
        logprobs=body.logprobs,
        vocab_size=service.lm.config.vocab_size,
    )
    prompts = await service.aside(lambda: encoded(service, body))
    requests = service.requests(prompts, asked, "prompt", prompt_logprobs=body.logprobs if body.echo else None)
    answer = _Answer(service, body, asked, prompts, nothing_new=max_tokens == 0)
    ticket = service.submit(requests, asked, origin_of(http, body, answer.id, "text_completion"))
    if asked.stream:
        deliveries = await begin(http, service.scheduler, ticket)
        events = answer.events(deliveries)
        return EventStream(events, lambda: service.scheduler.cancel(ticket))
    return JSONResponse(answer.whole(await all_ends(http, service.scheduler, ticket)))


def encoded(service: Service, body: CompletionBody) -> list[list[int]]:
    """Token ids of a body's prompts.

    Raises:
        PromptError: A prompt is empty or has half a character.
    """
    prompt: Any = body.prompt
    if prompt in ("", [], [""]):
        raise ApiError(400, "prompt is empty; give at least one token", param="prompt", code="invalid_value")
    return service.lm.encode(prompt)


class _Answer:
    """The bodies of one answer."""

    def __init__(
        self, service: Service, body: CompletionBody, asked: Wanted, prompts: Sequence[Sequence[int]], nothing_new: bool
    ) -> None:
        self._service, self._asked, self._prompts, self._nothing_new = service, asked, prompts, nothing_new
        self.id = f"cmpl-{uuid4().hex}"
        self._head = {
            "id": self.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
        }
        self._echo = bool(body.echo)
        self._logprobs = [
            CompletionLogprobs(service.lm.text_tokenizer, body.logprobs)
            for _ in range(len(prompts) * asked.num_choices)
        ]

    def whole(self, ends: Sequence[JobEnd]) -> dict[str, Any]:
        """The answer at once."""
        results = [end.result for end in ends]
        choices = []
        for end in ends:
            result, kept = end.result, self._logprobs[end.place]
            if self._asked.num_logprobs is not None:
                if self._echo:
                    kept.add(self._prompt(end.place), result.prompt_logprobs or ())
                if not self._nothing_new:
                    kept.add(result.token_ids, result.logprobs or ())
            choices.append(self._choice(end.place, self._text(end), FINISH_REASONS[result.finish_reason], kept.take()))
        dropped = int(self._nothing_new)
        return {
            **self._head,
            "choices": choices,
            "usage": usage(results, self._asked.num_choices, dropped=dropped),
            "metrics": metrics(results),
        }

    async def events(self, deliveries: AsyncIterator[Delivery]) -> AsyncIterator[bytes]:
        """The answer as it comes."""
        ends: dict[int, JobEnd] = {}
        begun: set[int] = set()
        async for delivery in deliveries:
            if isinstance(delivery, JobFailure):
                yield sse(api_error(delivery.error).body)
                break
            first = delivery.place not in begun
            begun.add(delivery.place)
            if isinstance(delivery, RoundPiece):
                for chunk in self._piece(delivery, first=first):
                    yield sse(chunk)
            else:
                ends[delivery.place] = delivery
                text = "" if self._nothing_new else delivery.text
                reason = FINISH_REASONS[delivery.result.finish_reason]
                yield sse(self._chunk(self._choice(delivery.place, text, reason, None)))
        else:
            if self._asked.include_usage:
                results = [ends[place].result for place in sorted(ends)]
                counted = usage(results, self._asked.num_choices, dropped=int(self._nothing_new))
                yield sse({**self._head, "choices": [], "usage": counted, "metrics": metrics(results)})
        yield DONE

    def _piece(self, piece: RoundPiece, *, first: bool) -> list[dict[str, Any]]:
        kept, text = self._logprobs[piece.place], piece.text
        if piece.prompt_logprobs:
            kept.add(self._prompt(piece.place), piece.prompt_logprobs)
        if self._nothing_new:
            text = ""
        elif self._asked.num_logprobs is not None:
            kept.add([token.token_id for token in piece.tokens], [t.logprobs for t in piece.tokens if t.logprobs])
        if self._echo and first:
            text = self._prompt_text(piece.place) + text
        taken = kept.take()
        if not text and not taken and not self._asked.include_drafts:
            return []
        chunk = self._chunk(self._choice(piece.place, text, None, taken))
        if self._asked.include_drafts:
            chunk["speculation"] = speculation(piece)
        return [chunk]

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "choices": [choice]}

    def _choice(self, place: int, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": place, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _prompt(self, place: int) -> Sequence[int]:
        return self._prompts[place // self._asked.num_choices]

    def _prompt_text(self, place: int) -> str:
        tokens = list(self._prompt(place))
        decoded = self._service.lm.text_tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(decoded)

    def _text(self, end: JobEnd) -> str:
        text = "" if self._nothing_new else end.result.text
        return self._prompt_text(end.place) + text if self._echo else text
