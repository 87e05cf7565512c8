"""What a server is told at its start: where it listens, who may ask, and how much of everything is allowed."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from layerskip.checks import finite_number, whole_number
from layerskip.errors import InvalidArgumentError

MOST_PORT = 65535
MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What one request may ask for at most; more is refused with status 400 or 413."""

    body_bytes: int = 4 * MEBIBYTE
    """Bytes of a request's body."""
    nesting: int = 64
    """Levels of lists and objects in a body."""
    choices: int = 128
    """Texts that one request may generate: prompts times `n`."""
    stop_strings: int = 16
    stop_characters: int = 256
    """Characters of each stop string."""
    logit_biases: int = 1024
    tools: int = 128
    schema_bytes: int = 65_536
    """Bytes of a JSON schema."""
    header_seconds: float = 10.0
    """Seconds within which the head of a request must arrive."""
    body_seconds: float = 30.0
    """Seconds within which its body must arrive."""
    send_seconds: float = 60.0
    """Seconds that a client may take to receive a piece of an answer."""
    connections: int = 4096
    """Connections that are open at once."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How to serve one model."""

    host: str = "127.0.0.1"
    """Address to listen at."""
    port: int = 8000
    """Port to listen at; 0: any free one."""
    api_key_file: Path | None = None
    """File with the keys that clients may use, one in each line."""
    insecure: bool = False
    """Let other machines ask without a key."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names by which clients may call this server (the Host header), where no key is asked for."""
    served_name: str | None = None
    """What the model is called; its own name if not given."""
    max_concurrency: int = 16
    """Texts that are generated at once."""
    max_queue: int = 64
    """Requests that may wait for their turn; others are refused with status 503."""
    max_model_len: int | None = None
    """Tokens of a prompt and its answer together; what the model and the memory allow if not given."""
    cache_memory: float | None = None
    """GiB for keys and values, reserved at the start; a share of the free memory if not given."""
    request_timeout: float = 600.0
    """Seconds after which a request is given up."""
    drain_timeout: float = 30.0
    """Seconds that running requests have to end once the server is asked to stop."""
    log_prompts: bool = False
    """Write prompts and answers into the log as well."""
    otlp_endpoint: str | None = None
    """Where OpenTelemetry sends its traces; none are made if not given."""
    limits: RequestLimits = field(default_factory=RequestLimits)

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            InvalidArgumentError: Naming the field, its value and what is allowed.
        """
        whole_number("port", self.port, least=0, most=MOST_PORT)
        for name, least, most in (("max_concurrency", 1, 4096), ("max_queue", 0, 1_000_000)):
            whole_number(name, getattr(self, name), least=least, most=most)
        if self.max_model_len is not None:
            whole_number("max_model_len", self.max_model_len, least=2)
        for name in ("request_timeout", "drain_timeout", "cache_memory"):
            value = getattr(self, name)
            if value is not None:
                finite_number(name, value, "above 0", lambda x: x > 0)
        if not self.is_local and self.api_key_file is None and not self.insecure:
            raise InvalidArgumentError(
                f"host {self.host!r} lets other machines in; give a file with keys (--api-key-file FILE), or "
                "--insecure to let everyone in who reaches that address"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False
