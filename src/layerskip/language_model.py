"""The package's front: a checkpoint that generates, streams and scores text."""

import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from layerskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from layerskip.checkpoint.loading.adapters import AdapterSet
from layerskip.checkpoint.loading.config import LoadingConfig, make_loading_config
from layerskip.checks import check_text, whole_number
from layerskip.decoding.adaptive.experience import Experience
from layerskip.decoding.config import GenerationConfig, make_config
from layerskip.decoding.engine import Engine
from layerskip.decoding.output.events import GenerationResult
from layerskip.decoding.output.stream import GenerationStream, generate_each
from layerskip.decoding.output.writer import RowWriter
from layerskip.decoding.request import Request, make_request
from layerskip.decoding.rules.constraint import Constraint
from layerskip.decoding.scoring import Score, all_logits, score_tokens
from layerskip.errors import InvalidArgumentError, TokenizerError
from layerskip.model.config.model_config import ModelConfig
from layerskip.model.decoder import Decoder
from layerskip.text.chat_template import AnswerFrame, Message, answer_frame, render, require_template
from layerskip.text.prompts import Prompt, Prompts, encode_prompts
from layerskip.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SESSION_TOKENS = 1024
"""Tokens for which a session has room at first."""


def load(
    name: str, config: LoadingConfig | None = None, *, revision: str | None = None, **options: Any
) -> "LanguageModel":
    """Load a checkpoint.

    Args:
        name: `demo` (the embedded model), `smollm2` or `gemma3-270m` (from packages of the Python registry where these
            are installed, else from the hub), a folder, a GGUF file, or a hub id (`owner/name`).
        config: How to load it.
        revision: Branch, tag or commit of a hub repository.
        **options: Fields of `LoadingConfig`, such as `dtype`, `device`, `kernels` or `quantize`; they win over
            `config`.

    Raises:
        CheckpointError: The checkpoint can't be found, read or understood; its subclasses say which.
        OutOfMemoryError: The weights don't fit.
        InvalidArgumentError: An unknown option, a bad dtype, device or context, kernels that can't run the model, or
            `max` where there is no compiler.

    Example:
        >>> lm = load("demo")
        >>> lm.generate(["def add(a, b):"], max_new_tokens=20)[0].text
    """
    loading = make_loading_config(config, options)
    checkpoint = open_checkpoint(name, revision=revision)
    return LanguageModel.of(checkpoint, loading)


@dataclass(eq=False)
class Session:
    """Keys and values kept between calls, for prompts that begin like earlier ones: only what is new is read."""

    engine: Engine


class LanguageModel:
    """A network with its tokenizer."""

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, adapters: AdapterSet | None = None) -> None:
        """Put together what `load` has loaded.

        Args:
            checkpoint: Where the network comes from.
            decoder: The network.
            adapters: What describes its exit adapters.
        """
        self.checkpoint = checkpoint
        self.decoder = decoder
        self.exit_adapters = adapters
        self._frames: dict[str, AnswerFrame] = {}
        self._experience = Experience(
            decoder,
            checkpoint.tuned,
            adapters.adapters if adapters is not None else (),
            trained="layerskip" in checkpoint.raw_config,
        )

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: LoadingConfig) -> "LanguageModel":
        """Load a checkpoint that is open; raises as `load`."""
        decoder = checkpoint.load_decoder(config)
        return cls(checkpoint, decoder, checkpoint.find_exit_adapters(config.exit_adapters))

    @property
    def config(self) -> ModelConfig:
        """The network's sizes and switches."""
        return self.decoder.config

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer as transformers has it, loaded when first used; raises `TokenizerError` if there is none."""
        return self.checkpoint.tokenizer

    @property
    def text_tokenizer(self) -> Tokenizer:
        """The same without transformers, where that gives the same and `tokenizer` wasn't asked for."""
        return self.checkpoint.text_tokenizer

    def generate(
        self, prompts: Prompts, config: GenerationConfig | None = None, **options: Any
    ) -> list[GenerationResult]:
        """Write after each prompt.

        Args:
            prompts: One or several: texts, token ids, or what a tokenizer returned (`encode` says more).
            config: How to decode.
            **options: Fields of `GenerationConfig`; they win over `config`.

        Returns:
            Results in the order of the prompts.

        Raises:
            PromptError: A prompt is empty or too long.
            InvalidArgumentError: A bad option.
            OutOfMemoryError: The cache doesn't fit.
        """
        stream = self._stream(prompts, self.configure(config, **options), show_drafts=False, session=None)
        return stream.run()

    def stream(
        self,
        prompts: Prompts,
        config: GenerationConfig | None = None,
        *,
        show_drafts: bool = False,
        session: Session | None = None,
        **options: Any,
    ) -> GenerationStream:
        """Write after one or more prompts, telling token by token what happens.

        Args:
            prompts: One or several: texts, token ids, or what a tokenizer returned (`encode` says more).
            config: How to decode.
            show_drafts: Also tell drafts before they are verified.
            session: Keys and values of earlier calls (`new_session`), for prompts that begin alike.
            **options: Fields of `GenerationConfig`; they win over `config`.

        Returns:
            An iterator of events. Ctrl-C ends it with what was written so far.
        """
        return self._stream(prompts, self.configure(config, **options), show_drafts=show_drafts, session=session)

    def configure(self, config: GenerationConfig | None = None, **options: Any) -> GenerationConfig:
        """What a call with this config and these options does: self-speculation takes what is open from the sweep.

        Raises:
            InvalidArgumentError: A bad option.
        """
        made, tuned = make_config(config, options), self.checkpoint.tuned
        if tuned is None or made.strategy != "self_speculative":
            return made
        if made.exit_layer is None:
            made = replace(made, exit_layer=tuned.exit_layer)
        if made.num_speculations is None and made.exit_layer == tuned.exit_layer:
            made = replace(made, num_speculations=tuned.num_speculations)
        return made

    def new_session(self, slots: int = 1) -> Session:
        """An empty session; it grows between calls, up to the model's context.

        Args:
            slots: Sequences whose keys and values are kept; the least recently used goes first.

        Raises:
            InvalidArgumentError: Fewer than 1 slot.
            OutOfMemoryError: The cache doesn't fit.
        """
        slots = whole_number("slots", slots, least=1)
        capacity = min(SESSION_TOKENS, self.decoder.max_context)
        return Session(self.new_engine(max_rows=slots, capacity=capacity, keeps_prefixes=True))

    def score(
        self,
        prompts: Prompts,
        continuations: Prompts | None = None,
        *,
        exit_layer: int | None = None,
    ) -> list[Score]:
        """Log-likelihoods of continuations after their prompts, or of the prompts themselves.

        Args:
            prompts: One or several: texts, token ids, or what a tokenizer returned (`encode` says more).
            continuations: One for each prompt, of the same kind; if not given, each prompt's own tokens after its
                first are scored.
            exit_layer: Layers to run (1..L); all if not given. An early exit gives other scores.

        Raises:
            PromptError: Nothing to score, or too long.
            InvalidArgumentError: A bad exit layer, or not as many continuations as prompts.
        """
        contexts = self.encode(prompts)
        if continuations is None:
            contexts, targets = [c[:1] for c in contexts], [c[1:] for c in contexts]
        else:
            targets = self.encode(continuations, special_tokens=False)
        if len(targets) != len(contexts):
            raise InvalidArgumentError(f"{len(contexts)} prompts need as many continuations, got {len(targets)}")
        return score_tokens(self.decoder, contexts, targets, self._depth(exit_layer))

    def logits(self, token_ids: Prompt, exit_layer: int | None = None) -> Tensor:
        """Logits after each token: [Q, V], float32.

        Args:
            token_ids: Q token ids, in whatever form `encode` takes.
            exit_layer: Layers to run (1..L); all if not given.

        Raises:
            PromptError: No tokens, too many, or ids outside the vocabulary.
            InvalidArgumentError: A bad exit layer.
        """
        texts = self.encode(token_ids)
        if len(texts) > 1:
            raise InvalidArgumentError(f"logits are those of one text; got {len(texts)}")
        (tokens,) = texts or [[]]
        return all_logits(self.decoder, tokens, self._depth(exit_layer))

    def encode(self, prompts: Prompts, *, special_tokens: bool = True) -> list[list[int]]:
        """Token ids of prompts.

        Args:
            prompts: One or several: texts; token ids in lists, arrays or tensors; or what a tokenizer returned, of
                which padding is dropped. Conversations: `encode_chat`.
            special_tokens: Give texts the tokenizer's own special tokens, such as a leading <s>, but no second one.

        Raises:
            PromptError: Something that is neither text nor token ids, or a text with half a character.
            TokenizerError: There is no tokenizer for a text.
        """
        return encode_prompts(prompts, lambda: self.text_tokenizer, special_tokens=special_tokens)

    def encode_chat(
        self,
        messages: Iterable[Message],
        *,
        template: str | None = None,
        tools: Sequence[Any] | None = None,
        name: str = "the conversation",
    ) -> list[int]:
        """Token ids of a conversation by the tokenizer's chat template, up to where the answer begins.

        Args:
            messages: What was said, in order: `role` and `content`.
            template: A Jinja template in place of the tokenizer's.
            tools: Functions that the model may call, as JSON schemas.
            name: What an error calls the conversation.

        Raises:
            TokenizerError: No tokenizer, no chat template, or a broken one.
            PromptError: The template doesn't take the messages.
        """
        tools = None if tools is None else list(tools)
        require_template(self.text_tokenizer, self.checkpoint.name, template, tools=tools)
        text = render(self.text_tokenizer, messages, template=template, tools=tools, name=name)
        check_text(text, name)
        (tokens,) = self.encode(text, special_tokens=False)
        return tokens

    def end_tokens(self, prompt: Sequence[int], template: str | None = None) -> tuple[int, ...]:
        """Tokens that end what is written after a prompt, if a config names none.

        They are the checkpoint's (`Checkpoint.eos_token_ids`). After a conversation, the token that the chat template
        puts after an answer is one too, however the conversation became a prompt: a prompt that holds this token, or
        stops where the template begins an answer, is a conversation.

        Args:
            prompt: Token ids.
            template: A Jinja template in place of the tokenizer's.
        """
        own = self.checkpoint.eos_token_ids
        frame = self._answer_frame(template)
        if frame is None or set(frame.end_tokens) <= set(own):
            return own
        return tuple(dict.fromkeys((*own, *frame.ends_of(self.text_tokenizer, prompt))))

    def _answer_frame(self, template: str | None) -> AnswerFrame | None:
        """What the template writes around an answer; None without a template."""
        try:
            wanted = template or self.text_tokenizer.chat_template
        except TokenizerError:
            return None
        if not wanted:
            return None
        key = str(wanted)
        if key not in self._frames:
            self._frames[key] = answer_frame(self.text_tokenizer, template)
        return self._frames[key]

    def _depth(self, exit_layer: int | None) -> int:
        return self.decoder.num_layers if exit_layer is None else self.config.check_exit_layer(exit_layer)

    def _stream(
        self, prompts: Prompts, config: GenerationConfig, *, show_drafts: bool, session: Session | None
    ) -> GenerationStream:
        encoded = self.encode(prompts)
        seed = self.decoder.common(secrets.randbits(63)) if config.seed is None else config.seed
        if not encoded:
            raise InvalidArgumentError("no prompts were given; give at least one")
        requests = [self.request(prompt, config, seed=seed, index=index) for index, prompt in enumerate(encoded)]
        return self.start(requests, show_drafts=show_drafts, session=session)

    def request(
        self,
        prompt: Sequence[int],
        config: GenerationConfig,
        *,
        seed: int,
        index: int = 0,
        constraint: Constraint | None = None,
        prompt_logprobs: int | None = None,
    ) -> Request:
        """What the engine is asked for a prompt, checked.

        Args:
            prompt: Token ids.
            config: How to decode.
            seed: Seed of sampling.
            index: The prompt's place among the caller's, for errors.
            constraint: What may be generated at all (`structured.compiler.Grammar.start`).
            prompt_logprobs: Tell the log-probability of each token of the prompt, and of this many likeliest ones.

        Raises:
            PromptError: The prompt is empty, too long, or has ids outside the vocabulary.
            InvalidArgumentError: An exit layer that the network doesn't have, or a bias of such a token.
        """
        return make_request(
            self.decoder,
            prompt,
            config,
            seed=seed,
            eos_token_ids=self.end_tokens(prompt),
            index=index,
            constraint=constraint,
            prompt_logprobs=prompt_logprobs,
        )

    def start(
        self, requests: Sequence[Request], *, show_drafts: bool = False, session: Session | None = None
    ) -> GenerationStream:
        """Generate for requests that begin together.

        Args:
            requests: From `request`; they may differ in everything.
            show_drafts: Also report drafts.
            session: Keys and values of earlier calls.

        Raises:
            InvalidArgumentError: More requests than the session has slots.
            OutOfMemoryError: The cache doesn't fit.
        """
        tokenizer = self._tokenizer_or_none(requests)
        capacity = max(len(request.tokens) + request.max_new_tokens for request in requests)
        if session is None:
            engine = self.new_engine(max_rows=len(requests), capacity=capacity)
        else:
            engine = session.engine
            for row in engine.rows:  # of a stream that was left before its end
                engine.finish(row, "interrupted")
            if len(requests) > engine.free_rows:
                raise InvalidArgumentError(
                    f"{len(requests)} prompts at once need as many slots, and the session has {engine.free_rows}; "
                    f"make one with new_session(slots={len(requests)})"
                )
            if capacity > engine.capacity:
                engine.reserve(engine.free_rows, min(max(capacity, 2 * engine.capacity), self.decoder.max_context))
        rows = [engine.add(request) for request in requests]
        writers = [RowWriter(engine, row, tokenizer, index) for index, row in enumerate(rows)]
        return GenerationStream(engine, writers, show_drafts=show_drafts)

    def generate_each(self, requests: Sequence[Request], *, max_rows: int) -> Iterator[tuple[int, GenerationResult]]:
        """Generate for many requests, each of which begins as soon as another one ends.

        Args:
            requests: From `request`; they may differ in everything.
            max_rows: Requests that run at once, at most.

        Returns:
            Pairs of a request's place and its result, as they end.

        Raises:
            OutOfMemoryError: The cache doesn't fit.
        """
        capacity = max(len(request.tokens) + request.max_new_tokens for request in requests)
        engine = self.new_engine(max_rows=min(max_rows, len(requests)), capacity=capacity, keeps_prefixes=True)
        return generate_each(engine, requests, self._tokenizer_or_none(requests))

    def new_engine(self, *, max_rows: int, capacity: int, **options: Any) -> Engine:
        """An engine of this network, with what is known of it.

        Args:
            max_rows: Rows that may run at once.
            capacity: Tokens that a row can hold: its prompt and what is generated.
            **options: As for `Engine`.

        Raises:
            OutOfMemoryError: The cache doesn't fit.
        """
        return Engine(self.decoder, max_rows=max_rows, capacity=capacity, experience=self._experience, **options)

    def _tokenizer_or_none(self, requests: Sequence[Request]) -> Tokenizer | None:
        """Token ids need no tokenizer, unless stop strings are to be found in their text."""
        try:
            return self.text_tokenizer
        except TokenizerError:
            if any(request.config.stop for request in requests):
                raise
            return None
