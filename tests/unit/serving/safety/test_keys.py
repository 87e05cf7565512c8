import base64
from pathlib import Path

import pytest

from layerskip.errors import InvalidArgumentError
from layerskip.serving.safety.keys import Keys


def basic(password: str, user: str = "") -> bytes:
    return b"Basic " + base64.b64encode(f"{user}:{password}".encode())


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    file = tmp_path / "keys"
    file.write_bytes(b"# for tests\r\nalpha-key\r\n\n  beta:key  \n")
    return Keys.read(file)


@pytest.mark.parametrize(
    "header",
    [b"Bearer alpha-key", b"bearer  alpha-key ", b"BEARER beta:key", basic("alpha-key"), basic("beta:key", "anyone")],
)
def test_known_keys(keys: Keys, header: bytes) -> None:
    assert keys.admit(header)


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer alpha-ke",
        b"Bearer alpha-keyy",
        b"Bearer Alpha-key",
        b"Bearer # for tests",
        b"Token alpha-key",
        b"alpha-key",
        b"Basic alpha-key",
        b"Basic !!!",
        basic(""),
        basic("wrong"),
        b"Bearer \xff\xfe",
    ],
)
def test_others(keys: Keys, header: bytes | None) -> None:
    assert not keys.admit(header)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no key"),
        (b"# only\n\n", "has no key"),
        (b"short\n", "line 1"),
        (b"good-enough\nwith space in\n", "line 2"),
        (b"\xc3\xa4\xc3\xb6\xc3\xbc-long-enough\n", "line 1"),
        (b"a" * 1_000_001, "more than"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=words):
        Keys.read(file)
    with pytest.raises(InvalidArgumentError, match="can't be read"):
        Keys.read(tmp_path / "none")
    with pytest.raises(InvalidArgumentError, match="can't be read"):
        Keys.read(tmp_path)
