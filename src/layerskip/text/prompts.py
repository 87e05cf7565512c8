"""What callers give as prompts -> token ids: texts, ids in any container, or what a tokenizer returned."""

from collections.abc import Callable, Iterable, Mapping
from operator import index
from typing import Any

from torch import Tensor

from layerskip.checks import check_text
from layerskip.errors import PromptError
from layerskip.text.tokenizer import Tokenizer

Prompt = str | Iterable[int] | Mapping[str, Any] | Tensor
"""One text: as text, token ids, or what a tokenizer returned for it."""
Prompts = Prompt | Iterable[Prompt]
"""One or several of them; also what a tokenizer returned for several texts."""
TokenizerGetter = Callable[[], Tokenizer]


def encode_prompts(given: Prompts, tokenizer: TokenizerGetter, *, special_tokens: bool = True) -> list[list[int]]:
    """Token ids of each prompt.

    A text gets the tokenizer's own special tokens, such as a leading <s>, but no second one where it has it already (a
    rendered chat). Of a tokenizer's output, tokens with an attention mask of 0 are dropped: padding.

    Args:
        given: A prompt or several.
        tokenizer: Called for the tokenizer where there is text.
        special_tokens: Whether texts get special tokens at all.

    Raises:
        PromptError: Something that is neither text nor token ids; names its place.
        TokenizerError: There is no tokenizer for a text.
    """
    return [
        _encode_text(prompt, place, tokenizer(), special_tokens) if isinstance(prompt, str) else prompt
        for place, prompt in enumerate(_several(given))
    ]


def _several(given: object) -> list[str | list[int]]:
    """Prompts one by one; ids are checked, texts not yet."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, Mapping):
        return _of_tokenizer(given)
    items = _items(given, "prompts")
    if items and all(map(_is_id, items)):
        return [[index(item) for item in items]]
    prompts: list[str | list[int]] = []
    for place, item in enumerate(items):
        if isinstance(item, str):
            prompts.append(item)
        elif isinstance(item, Mapping):
            found = _of_tokenizer(item, f"prompt {place}")
            if len(found) != 1:
                raise PromptError(f"prompt {place} holds {len(found)} texts; give each as a prompt of its own")
            prompts += found
        else:
            prompts.append(_ids(item, f"prompt {place}"))
    return prompts


def _of_tokenizer(given: Mapping[str, Any], name: str = "prompts") -> list[str | list[int]]:
    """Prompts of a tokenizer's output: its `input_ids`, without those that `attention_mask` leaves out."""
    if "input_ids" not in given:
        keys = ", ".join(map(repr, given)) or "nothing"
        chat = "role" in given and "content" in given
        fix = "encode a conversation by LanguageModel.encode_chat(messages)" if chat else "give a tokenizer's output"
        raise PromptError(f"{name} is a mapping without 'input_ids' (it has {keys}); {fix}")
    ids, mask = given["input_ids"], given.get("attention_mask")
    rows = _items(ids, f"the input_ids of {name}")
    if not rows or all(map(_is_id, rows)):
        rows, mask = [rows], None if mask is None else [mask]
    masks = [None] * len(rows) if mask is None else _items(mask, f"the attention_mask of {name}")
    if len(masks) != len(rows):
        raise PromptError(f"{name} has {len(rows)} rows of input_ids and {len(masks)} of attention_mask")
    return [
        _unmasked(_ids(row, f"row {place} of {name}"), marks, f"row {place} of {name}")
        for place, (row, marks) in enumerate(zip(rows, masks, strict=True))
    ]


def _unmasked(ids: list[int], mask: object, name: str) -> list[int]:
    if mask is None:
        return ids
    marks = _items(mask, f"the attention_mask of {name}")
    if len(marks) != len(ids):
        raise PromptError(f"{name} has {len(ids)} input_ids and {len(marks)} marks of attention_mask")
    return [token for token, mark in zip(ids, marks, strict=True) if mark]


def _ids(given: object, name: str) -> list[int]:
    ids = _items(given, name)
    for place, item in enumerate(ids):
        if not _is_id(item):
            raise PromptError(
                f"{name} must be a text or a list of token ids: item {place} is {_shown(item)}; ids are whole numbers"
            )
    return [index(item) for item in ids]


def _items(given: object, name: str) -> list[Any]:
    """Items of a list, an array, a tensor or an iterator; what only looks like one is refused."""
    if isinstance(given, bytes | bytearray | memoryview):
        raise PromptError(
            f"{name} must be a text or a list of token ids, got {type(given).__name__}; decode it: .decode('utf-8')"
        )
    if hasattr(given, "tolist"):  # a tensor or an array, of any library
        given = given.tolist()
    if not isinstance(given, Iterable) or isinstance(given, str | Mapping | set | frozenset):
        raise PromptError(f"{name} must be a text or a list of token ids, got {_shown(given)}")
    return list(given)


def _is_id(item: object) -> bool:
    """Whether it is a whole number; True and False aren't meant as ones."""
    if type(item) is int:
        return True
    if isinstance(item, bool) or getattr(item, "ndim", None):
        return False
    try:
        index(item)  # type: ignore[arg-type]
    except TypeError:
        return False
    return "bool" not in str(getattr(item, "dtype", ""))


def _encode_text(text: str, place: int, tokenizer: Tokenizer, special_tokens: bool) -> list[int]:
    if not text:
        raise PromptError(f"prompt {place} is empty; give at least one character")
    check_text(text, f"prompt {place}")
    ids = tokenizer.encode(text, add_special_tokens=special_tokens)
    if special_tokens and len(ids) > 1 and ids[0] == ids[1]:  # the text's own <s> after the tokenizer's?
        own = tokenizer.encode(text, add_special_tokens=False)
        if own == ids[1:] and ids[0] in tokenizer.all_special_ids:
            return own
    return ids


def _shown(item: object) -> str:
    """A value as an error names it."""
    if isinstance(item, bool | int | float | str) or item is None:
        text = ascii(item)
        return text if len(text) <= 40 else f"{text[:40]}..."
    return f"a {type(item).__name__}"
