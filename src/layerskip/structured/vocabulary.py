"""A checkpoint's tokens as llguidance takes them."""

from typing import TYPE_CHECKING, Any

from layerskip.errors import GrammarError, brief
from layerskip.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

END = "<|layerskip: the text may end here|>"
"""The name of a token that is added for grammars alone. Which tokens end a text is the request's affair; where this one
is allowed, they are."""


def import_llguidance() -> Any:
    """The library.

    Raises:
        GrammarError: It isn't installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise GrammarError(
            "structured output needs llguidance; install it with: pip install 'layerskip[serve]'"
        ) from error
    return llguidance


def grammar_tokenizer(tokenizer: Tokenizer) -> tuple["LLTokenizer", int]:
    """The tokenizer in llguidance's form, and the id of its end token, which the model doesn't have.

    Args:
        tokenizer: The checkpoint's, ours or transformers'.

    Raises:
        GrammarError: The tokenizer isn't one whose tokens are bytes (byte-level or with byte fallback), or llguidance
            isn't installed.
    """
    llguidance = import_llguidance()
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    backend = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "backend", None)
    if not isinstance(backend, Backend):
        raise GrammarError(
            f"structured output needs a tokenizer of the tokenizers library, and this is {type(tokenizer).__name__}"
        )
    extended = Backend.from_str(backend.to_str())
    extended.no_truncation()
    extended.no_padding()
    extended.add_special_tokens([AddedToken(END, special=True)])
    end = extended.token_to_id(END)
    assert end is not None
    try:
        return llguidance.LLTokenizer(extended.to_str(), eos_token=end), end
    except ValueError as error:
        raise GrammarError(
            f"structured output needs tokens that are bytes, as byte-level tokenizers have them: {brief(error)}"
        ) from error
