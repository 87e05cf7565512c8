"""What the routes work with: the model, its scheduler, and the way from prompts to a ticket."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

from layerskip.decoding.engine import Engine
from layerskip.decoding.prefix.blocks import PrefixBlocks
from layerskip.decoding.request import Request
from layerskip.errors import PromptError, TokenizerError
from layerskip.language_model import LanguageModel
from layerskip.serving.config import ServerConfig
from layerskip.serving.conversation.turn import Conversations
from layerskip.serving.memory import CachePlan, plan_cache
from layerskip.serving.observer import Observer
from layerskip.serving.protocol.errors import ApiError, api_error
from layerskip.serving.protocol.options import Wanted
from layerskip.serving.scheduler import Scheduler
from layerskip.serving.ticket import Origin, Ticket

COMPILING = 4
"""Requests whose grammars are compiled at once; others wait for them."""

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Service:
    """One model, served."""

    lm: LanguageModel
    config: ServerConfig
    cache: CachePlan
    scheduler: Scheduler
    name: str
    """What the model is called."""
    created: int
    """Unix time at which it was loaded."""
    compiling: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(COMPILING, thread_name_prefix="layerskip-compiling")
    )
    """Threads that wait for grammars."""

    @classmethod
    def of(
        cls, lm: LanguageModel, config: ServerConfig, *, created: int, observer: Observer | None = None
    ) -> "Service":
        """Reserve the memory; nothing runs before `scheduler.start()`.

        Raises:
            TokenizerError: The checkpoint has no tokenizer.
            OutOfMemoryError: The cache doesn't fit.
            InvalidArgumentError: The sizes don't fit each other.
        """
        cache = plan_cache(lm.decoder, config)
        scheduler = Scheduler(
            lambda: make_engine(lm, cache), lm.text_tokenizer, max_queue=config.max_queue, observer=observer
        )
        name = config.served_name or lm.checkpoint.name
        return cls(lm=lm, config=config, cache=cache, scheduler=scheduler, name=name, created=created)

    @property
    def has_chat(self) -> bool:
        """Whether the model has a chat template."""
        try:
            return bool(self.lm.text_tokenizer.chat_template)
        except TokenizerError:
            return False

    def check_model(self, name: str | None) -> None:
        """Raise `ApiError` if a request is for another model."""
        if name not in (None, "", self.name):
            raise ApiError(
                404,
                f"the model {name!r} is not served here; use {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def room_after(self, prompt: Sequence[int], param: str) -> int:
        """Tokens that may follow a prompt.

        Raises:
            ApiError: None.
        """
        room = self.cache.capacity - len(prompt)
        if room < 1:
            message = (
                f"{param} has {len(prompt)} tokens, and this server holds {self.cache.capacity} of a prompt and its "
                "answer together; shorten it (max_model_len at the server's start sets the limit)"
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        return room

    def requests(
        self, prompts: Sequence[Sequence[int]], wanted: Wanted, param: str, *, prompt_logprobs: int | None = None
    ) -> list[Request]:
        """Requests of the engine: for each prompt as many as there are choices.

        Args:
            prompts: Token ids.
            wanted: What is asked for.
            param: The field that the prompts come from.
            prompt_logprobs: Most likely tokens whose log-probabilities are wanted at each place of the prompts.

        Raises:
            ApiError: More texts than one request may ask for.
            ApiError: A prompt is empty, too long, or has ids outside the vocabulary.
            InvalidArgumentError: An exit layer that the network doesn't have.
        """
        total = len(prompts) * wanted.num_choices
        if total > self.config.limits.choices:
            message = f"one request may ask for {self.config.limits.choices} texts (prompts times n), got {total}"
            raise ApiError(400, message, param="n" if wanted.num_choices > 1 else param, code="invalid_value")
        made = []
        for index, prompt in enumerate(prompts):
            room = self.room_after(prompt, param)
            config = self.lm.configure(wanted.config)
            for choice in range(wanted.num_choices):
                try:
                    request = self.lm.request(prompt, config, seed=wanted.seed_of(choice), index=index)
                except PromptError as error:
                    raise api_error(error, param) from error
                request = replace(request, max_new_tokens=min(request.max_new_tokens, room))
                if prompt_logprobs is not None:
                    request = replace(request, prompt_logprobs=prompt_logprobs)
                made.append(request)
        return made

    @cached_property
    def conversations(self) -> Conversations:
        """How conversations become prompts and grammars."""
        return Conversations(self.lm, self.config.limits)

    def submit(
        self, requests: Sequence[Request], wanted: Wanted, origin: Origin, *, shown: Mapping[int, str] | None = None
    ) -> Ticket:
        """Leave requests with the scheduler; call it in an event loop.

        Args:
            requests: What is asked for.
            wanted: By what rules, and how the answer is told.
            origin: Whose request it is.
            shown: Special tokens that are part of the text, and their texts.

        Raises:
            ApiError: The server is full or stops.
        """
        ticket = Ticket.of(
            requests,
            origin,
            timeout=self.config.request_timeout,
            in_pieces=wanted.stream,
            show_drafts=wanted.include_drafts,
            shown=shown,
        )
        self.scheduler.submit(ticket)
        return ticket

    def start(self) -> None:
        """Let the engine run, and prepare what the first conversation with a schema or tools would wait for."""
        self.scheduler.start()
        self.compiling.submit(self.conversations.prepare)

    def stop(self) -> None:
        """End what runs, and all threads."""
        self.scheduler.stop()
        self.compiling.shutdown(wait=False, cancel_futures=True)
        self.conversations.close()

    async def aside(self, work: Callable[[], Result], *, compiles: bool = False) -> Result:
        """Do something that takes a while outside the event loop, such as rendering and splitting a long prompt.

        Args:
            work: What to do.
            compiles: Whether a grammar is compiled, which may take seconds; others don't wait behind such work.
        """
        return await asyncio.get_running_loop().run_in_executor(self.compiling if compiles else None, work)


def make_engine(lm: LanguageModel, cache: CachePlan) -> Engine:
    """The engine that answers all requests."""
    engine = lm.new_engine(
        max_rows=cache.rows,
        capacity=cache.capacity,
        prefix_blocks=PrefixBlocks(max_bytes=cache.prefix_bytes) if cache.prefix_bytes else None,
        paces_reading=True,
        shares_suffixes=True,
    )
    engine.take_memory()
    return engine
