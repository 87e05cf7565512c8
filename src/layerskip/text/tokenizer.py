"""Text to tokens and back: what this package asks of a tokenizer, and one that needs no transformers.

transformers takes longer to import than torch. `TextTokenizer` does with the `tokenizers` library what most calls need,
under transformers' names; `Tokenizer` is what it and transformers' tokenizers have in common.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from layerskip.text.rendering import render_template

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

ChatTemplates = str | dict[str, str]
"""One chat template, or several by name."""


class Tokenizer(Protocol):
    """What this package uses of a tokenizer; `TextTokenizer` and transformers' tokenizers have it."""

    @property
    def name_or_path(self) -> str:
        """Where it comes from."""
        ...

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Special tokens by what they are for: `bos_token`, `eos_token`, ..."""
        ...

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of all special tokens that the configuration names."""
        ...

    @property
    def added_tokens_decoder(self) -> dict[int, "AddedToken"]:
        """Tokens that are found in a text before it is split, by id."""
        ...

    @property
    def chat_template(self) -> ChatTemplates | None:
        """The chat template, or all by name."""
        ...

    def __len__(self) -> int:
        """Size of the vocabulary, added tokens included."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(
        self, token_ids: list[int], skip_special_tokens: bool = False, *, clean_up_tokenization_spaces: Literal[False]
    ) -> str | list[str]:
        """Text of token ids."""
        ...

    def convert_tokens_to_ids(self, tokens: list[str]) -> Any:
        """Ids of tokens by their names; for unknown names the id of the unknown token, if there is one."""
        ...

    def convert_ids_to_tokens(self, ids: list[int]) -> Any:
        """Names of tokens by their ids."""
        ...

    def get_chat_template(self, chat_template: str | None = None, tools: list[Any] | None = None) -> str:
        """The chat template that applies; `ValueError` if there is none."""
        ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        tools: list[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: Literal[False],
        **kwargs: Any,
    ) -> Any:
        """A conversation as the chat template writes it."""
        ...


class TextTokenizer:
    """A tokenizer of the `tokenizers` library, with special tokens and chat templates.

    Methods and attributes have the names and give the results of transformers' `PreTrainedTokenizerFast`.
    """

    def __init__(
        self,
        backend: "Backend",
        *,
        special_tokens: Mapping[str, str],
        extra_special_tokens: Sequence[str] = (),
        chat_template: ChatTemplates | None = None,
        name_or_path: str = "",
    ) -> None:
        """Add the special tokens that the backend doesn't know as such.

        Args:
            backend: Its settings are changed.
            special_tokens: By transformers' names (`bos_token`).
            extra_special_tokens: Those without a name.
            chat_template: The chat template, or several by name.
            name_or_path: Where it comes from.
        """
        from tokenizers import AddedToken

        self.backend = backend
        self.special_tokens_map = dict(special_tokens)
        self.chat_template = chat_template
        self.name_or_path = name_or_path
        self._special = list(dict.fromkeys((*special_tokens.values(), *extra_special_tokens)))
        backend.no_truncation()
        backend.no_padding()
        known = {token.content for token in self.added_tokens_decoder.values()}
        backend.add_tokens([AddedToken(token, special=True) for token in self._special if token not in known])

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of all special tokens that the configuration names."""
        return self.convert_tokens_to_ids(self._special)

    @property
    def added_tokens_decoder(self) -> dict[int, "AddedToken"]:
        """Tokens that are found in a text before it is split, by id."""
        return self.backend.get_added_tokens_decoder()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, by default with the special tokens that belong around it."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(
        self,
        token_ids: list[int],
        skip_special_tokens: bool = False,
        *,
        clean_up_tokenization_spaces: Literal[False] = False,
    ) -> str:
        """Text of token ids; spaces stay as they are."""
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        """Ids of tokens by their names; for unknown names the id of the unknown token, or None without one."""
        unknown: Any = self.backend.token_to_id(self.special_tokens_map.get("unk_token", ""))
        ids = [self.backend.token_to_id(token) for token in tokens]
        return [unknown if token_id is None else token_id for token_id in ids]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]:
        """Names of tokens by their ids; None where there is no such token."""
        return [self.backend.id_to_token(token_id) for token_id in ids]

    def get_chat_template(self, chat_template: str | None = None, tools: list[Any] | None = None) -> str:
        """The chat template that applies.

        Args:
            chat_template: A template, or the name of one, in place of the tokenizer's.
            tools: Functions that the model may call; there may be a template for conversations with them.

        Raises:
            ValueError: There is none, or there are several and none that is the default.
        """
        own = self.chat_template
        if not isinstance(own, dict):
            chosen = own if chat_template is None else chat_template
        elif chat_template is not None:
            chosen = own.get(chat_template, chat_template)
        else:
            chosen = own["tool_use"] if tools is not None and "tool_use" in own else own.get("default")
        if chosen is None:
            raise ValueError(f"there are templates called {sorted(own)}" if own else "there is no chat template")
        return chosen

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        tools: list[Any] | None = None,
        documents: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: Literal[False],
        **kwargs: Any,
    ) -> str:
        """A conversation as the chat template writes it.

        Args:
            conversation: The messages.
            tools: Functions that the model may call.
            documents: What the model may quote from.
            chat_template: A template, or the name of one, in place of the tokenizer's.
            add_generation_prompt: End where an answer begins.
            continue_final_message: Leave the last message open.
            tokenize: Only text is given.
            **kwargs: Other variables of the template.

        Raises:
            ValueError: There is no template, or no message.
            jinja2.TemplateError: The template is broken, or refuses the conversation.
        """
        return render_template(
            self.get_chat_template(chat_template, tools),
            conversation,
            tools=tools,
            documents=documents,
            variables={**self.special_tokens_map, **kwargs},
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
