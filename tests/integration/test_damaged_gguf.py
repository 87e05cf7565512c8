"""Two thousand damaged GGUF files: each loads and generates, or is refused in one line; nothing hangs or grows.

Damage is of the kinds that real files meet (cut, overwritten, spliced) and of those that a hostile one would try:
counts, lengths, offsets and types replaced by huge or odd ones, at the very places where the file has numbers.
"""

import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from gguf_files import convert
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import layerskip
from layerskip.checkpoint.checkpoint import open_checkpoint
from layerskip.errors import LayerSkipError

NUMBERS = st.sampled_from([0, 1, 2, 3, 7, 31, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
LEEWAY = 2**20
"""Bytes of memory that reading any header may take."""
Damage = Callable[[bytes], bytes]


@pytest.fixture(scope="module")
def content(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole file with a tokenizer."""
    texts = [*"abcdefghijklmnopqrstuvwxyz ,.", *(f"w{i}" for i in range(64))]
    tokens = ["<unk>", "<s>", "</s>", *texts]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, *([1] * len(texts))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }
    folder = tiny_checkpoint("llama", hidden_size=32, num_hidden_layers=2, vocab_size=len(tokens))
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return convert(folder, path, type_=GGMLQuantizationType.Q8_0, metadata=metadata).read_bytes()


def header_length(content: bytes) -> int:
    """Bytes before the tensors' data."""
    names = [match.end() for match in re.finditer(rb"blk\.\d\.[a-z_]+\.(weight|bias)|output_norm\.weight", content)]
    return max(names) + 64


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """One to three ways to damage a file, one after the other."""
    steps = [draw(st.sampled_from([cut, flip, number, number, splice])) for _ in range(draw(st.integers(1, 3)))]
    made = [step(draw) for step in steps]

    def damage(content: bytes) -> bytes:
        for step in made:
            content = step(content)
        return content

    return damage


def cut(draw: st.DrawFn) -> Damage:
    """The end is missing."""
    share = draw(st.floats(0, 1))
    return lambda content: content[: int(share * len(content))]


def flip(draw: st.DrawFn) -> Damage:
    """Some bytes of the header, or of all, have other values."""
    changes = draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8))
    in_header = draw(st.booleans())

    def damage(content: bytes) -> bytes:
        if not content:
            return content
        changed, length = bytearray(content), header_length(content) if in_header and b"blk." in content else 0
        for place, value in changes:
            changed[min(int(place * (length or len(content))), len(content) - 1)] = value
        return bytes(changed)

    return damage


def number(draw: st.DrawFn) -> Damage:
    """A number behind one of the file's names is another one."""
    which, shift = draw(st.floats(0, 0.999)), draw(st.sampled_from([0, 4, 8, 12, 16, 20, 24, -8]))
    code, value = draw(st.sampled_from("IQ")), draw(NUMBERS)

    def damage(content: bytes) -> bytes:
        names = [
            match.end() for match in re.finditer(rb"(llama|tokenizer|general|blk|output|token)[\w.]+", content[:20_000])
        ]
        places = [4, 8, 16, *names]
        place = places[int(which * len(places))] + (shift if which > 3 / len(places) else 0)
        written = struct.pack(f"<{code}", value & (2**32 - 1 if code == "I" else 2**64 - 1))
        return content[:place] + written + content[place + len(written) :]

    return damage


def splice(draw: st.DrawFn) -> Damage:
    """A piece is missing, or there twice."""
    first, length, twice = draw(st.floats(0, 1)), draw(st.integers(1, 200)), draw(st.booleans())

    def damage(content: bytes) -> bytes:
        place = int(first * min(len(content), 20_000))
        piece = content[place : place + length]
        return content[:place] + (piece * 2 if twice else b"") + content[place + length :]

    return damage


@pytest.mark.slow
def test_damaged_files(content: bytes, tmp_path: Path) -> None:
    outcomes = {"loaded": 0, "refused": 0}
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert attempt(path) is None  # also imports what reading files needs, before memory is counted

    @settings(
        max_examples=3000, deadline=20_000, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )
    @given(damages())
    def check(damage: Damage) -> None:
        path.write_bytes(damage(content))
        error = attempt(path)
        outcomes["loaded" if error is None else "refused"] += 1
        assert "\n" not in str(error)
        assert len(str(error)) < 1000

    check()
    assert outcomes["loaded"] >= 40
    assert outcomes["refused"] >= 500


def attempt(path: Path) -> LayerSkipError | None:
    """Load and generate, or say why not; the header may not take more memory than a small multiple of the file."""
    checkpoint = open_checkpoint(str(path))
    tracemalloc.start()
    try:
        _ = checkpoint.raw_config
        _ = checkpoint.config
    except LayerSkipError as error:
        return error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 20 * path.stat().st_size + LEEWAY
    try:
        lm = layerskip.load(str(path), device="cpu")
        lm.generate(["a b c, abc."], max_new_tokens=2)
    except LayerSkipError as error:
        return error
    return None
