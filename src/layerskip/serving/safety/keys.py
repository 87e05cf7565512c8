"""Keys that clients may use: read from a file, kept as digests, compared in constant time."""

import base64
import binascii
import hashlib
import hmac
from pathlib import Path

from layerskip.errors import InvalidArgumentError

LEAST_CHARACTERS = 8
MOST_BYTES = 1_000_000


class Keys:
    """The keys of a server."""

    def __init__(self, keys: list[str]) -> None:
        """Keep the digests of some keys."""
        self._digests = [_digest(key.encode()) for key in keys]

    @classmethod
    def read(cls, file: Path) -> "Keys":
        """The keys in a file: one in each line; empty lines and those that begin with # don't count.

        Raises:
            InvalidArgumentError: The file can't be read, or isn't a list of keys.
        """
        try:
            with file.open("rb") as opened:
                raw = opened.read(MOST_BYTES + 1)
        except OSError as error:
            raise InvalidArgumentError(f"the key file {str(file)!r} can't be read: {error.strerror}") from error
        if len(raw) > MOST_BYTES:
            raise InvalidArgumentError(
                f"the key file {str(file)!r} has more than {MOST_BYTES} bytes; is it another file?"
            )
        keys = []
        for number, line in enumerate(raw.split(b"\n"), start=1):
            text = line.strip()
            if not text or text.startswith(b"#"):
                continue
            if len(text) < LEAST_CHARACTERS or not all(0x21 <= byte <= 0x7E for byte in text):
                raise InvalidArgumentError(
                    f"line {number} of the key file {str(file)!r} is no key: keys are at least {LEAST_CHARACTERS} "
                    "printable ASCII characters without spaces, one key in each line"
                )
            keys.append(text.decode("ascii"))
        if not keys:
            raise InvalidArgumentError(f"the key file {str(file)!r} has no key; write one in each line")
        return cls(keys)

    def admit(self, authorization: bytes | None) -> bool:
        """Whether an `Authorization` header has one of the keys: as bearer token, or as password (browsers)."""
        scheme, _, given = (authorization or b"").partition(b" ")
        match scheme.lower():
            case b"bearer":
                key = given.strip()
            case b"basic":
                try:
                    key = base64.b64decode(given.strip(), validate=True).partition(b":")[2]
                except binascii.Error:
                    return False
            case _:
                return False
        digest = _digest(key)
        found = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them: no early end
        return any(found)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
