"""Chooses the documents that are held out for evaluation: a pure function of their content."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import nextafter

from layerskip.errors import InvalidArgumentError
from layerskip.training.data.reading.documents import HASH_BYTES, Document, TextDocument


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document is kept out of training.

    The same content is on the same side on every machine and in every run, whatever else is in the corpus; so are
    several answers to one prompt, or what was learned would be measured.

    Args:
        document: Any document; its origin doesn't matter.
        share: Share of documents to hold out.
    """
    return _position(document) < share


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a corpus is divided. `choose_split` makes it."""

    share: float
    """Documents whose hash lies in this share are held out."""
    cuts_texts: bool = False
    """Hold out the last part of each text instead."""

    def divide(self, document: Document) -> Iterator[tuple[Document, bool]]:
        """Yield a document's parts, one or two, and whether each is held out."""
        if not self.cuts_texts or not isinstance(document, TextDocument):
            yield document, is_held_out(document, self.share)
            return
        head, tail = cut_tail(document.text, self.share)
        if head.strip():
            yield replace(document, text=head), False
        if tail.strip():
            yield replace(document, text=tail), True


def choose_split(documents: Iterable[Document], share: float) -> Split:
    """The split of a corpus: by hash, or another way if the hash would hold out nothing.

    With few documents, all hashes may fall on one side; the common case is a single large text file. Then the last part
    of every text is held out, cut at a line. Prompts with completions and conversations can't be cut: if the corpus has
    any, the one document with the lowest hash is held out.

    Args:
        documents: The corpus; it is read until there are documents on both sides.
        share: Share to hold out, 0 for nothing.

    Raises:
        InvalidArgumentError: A single document that can't be cut, or many with one prompt.
    """
    if share == 0:
        return Split(share=0.0)
    lowest, highest, all_texts = 1.0, 0.0, True
    for document in documents:
        lowest, highest = min(lowest, _position(document)), max(highest, _position(document))
        if lowest < share <= highest:
            return Split(share=share)
        all_texts = all_texts and isinstance(document, TextDocument)
    if all_texts:
        return Split(share=share, cuts_texts=True)
    if lowest == highest:
        raise InvalidArgumentError(
            "nothing can be held out for evaluation: the data is a single example, or all examples have the same "
            "prompt; add data, or set held_out to 0"
        )
    return Split(share=nextafter(lowest, 1.0))


def cut_tail(text: str, share: float) -> tuple[str, str]:
    """Cut off about the last `share` of a text, before a line or else before a word.

    The tail is at most twice `share`, even if no line ends nearby.
    """
    size = len(text) * share
    latest = len(text) - max(1, round(size))
    earliest = max(0, round(len(text) - 2 * size))
    for separator in ("\n", " "):
        at = text.rfind(separator, earliest, latest)
        if at >= 0:
            # The tail of lines starts with a line, the tail of words with the space that tokenizers join to a word.
            at += separator == "\n"
            return text[:at], text[at:]
    return text[:latest], text[latest:]


def _position(document: Document) -> float:
    """Place of a document's prompt in 0..1."""
    return float(document.prompt_hash / 2 ** (8 * HASH_BYTES))
