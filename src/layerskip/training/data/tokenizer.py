"""Trains byte-level BPE tokenizers."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from layerskip.errors import InvalidArgumentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = SPECIALS = ("<s>", "</s>", "<pad>")
"""Ids 0, 1 and 2."""
MIN_VOCAB_SIZE = 256 + len(SPECIALS)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer; the same texts give the same tokenizer.

    The tokenizer adds `<s>` before a text, and decodes its own encoding to the same bytes.

    Args:
        texts: What to train on.
        vocab_size: Most tokens; there are fewer if the texts have too few different words.

    Raises:
        InvalidArgumentError: Fewer tokens than all bytes and the special tokens need, or no text.
    """
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < MIN_VOCAB_SIZE:
        raise InvalidArgumentError(
            f"vocab_size must be a whole number of at least {MIN_VOCAB_SIZE} (256 bytes and "
            f"{len(SPECIALS)} special tokens), got {vocab_size!r}"
        )
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, SPECIALS.index(BOS))]
    )
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    num_texts = 0

    def counted() -> Iterable[str]:
        nonlocal num_texts
        for text in texts:
            num_texts += 1
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if num_texts == 0:
        raise InvalidArgumentError("there is no text to train a tokenizer on; name some data")
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
