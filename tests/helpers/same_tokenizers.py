"""Whether two tokenizers give the same, whatever they are asked."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from hub_folders import DATA, make_tokenizer

TEXTS = [
    "",
    " ",
    "hi",
    " hi",
    "  two  spaces,\n\n    four 1234567",
    "The quick brown fox answers 12345 questions: où est la réponse? 😀\n\nIt's in the valley.",
    "e\u0301 \u00e9 日本語 שלום\u3000नमस्ते\tend ",
    "def add(a, b):\n    return a + b\n",
    "▁hi ▁",
    "<|no token|> <s",
]


def hub_tokenizer(name: str, folder: Path) -> Path:
    """A folder as the hub has it, without weights."""
    shutil.copytree(DATA / name, folder, dirs_exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(make_tokenizer(name), ensure_ascii=False), "utf-8")
    return folder


def texts_for(tokenizer: Any) -> list[str]:
    """Texts with the tokenizer's special and added tokens in every position."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values()][:12]
    first = tokenizer.special_tokens_map.get("bos_token", "")
    around = [f"{token}hi" for token in tokens] + [f"a {token} b" for token in tokens] + [f"hi\n{t}\n" for t in tokens]
    return [*TEXTS, *around, "".join(tokens), f"{first}hi", f"{first}{first} hi", f"{first} {first}"]


def assert_same(ours: Any, theirs: Any) -> None:
    """`ours` is a `TextTokenizer`, `theirs` transformers'."""
    for text in texts_for(theirs):
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special) == ids, text
            assert_same_texts(ours, theirs, ids)
    choose, vocabulary = random.Random(0), sorted(theirs.get_vocab().values())
    for _ in range(50):
        assert_same_texts(ours, theirs, choose.choices(vocabulary, k=choose.randint(1, 12)))
    ids = vocabulary[:2000]
    names = ours.convert_ids_to_tokens(ids)
    assert names == theirs.convert_ids_to_tokens(ids)
    names += ["<0x41>", "no such token", ""]
    assert ours.convert_tokens_to_ids(names) == theirs.convert_tokens_to_ids(names)
    assert len(ours) == len(theirs)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.all_special_ids == theirs.all_special_ids
    assert {i: repr(token) for i, token in ours.added_tokens_decoder.items()} == {
        i: repr(token) for i, token in theirs.added_tokens_decoder.items()
    }
    assert ours.chat_template == theirs.chat_template
    assert ours.name_or_path == theirs.name_or_path


def assert_same_texts(ours: Any, theirs: Any, ids: list[int]) -> None:
    for skips in (True, False):
        text = theirs.decode(ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False) == text, ids
