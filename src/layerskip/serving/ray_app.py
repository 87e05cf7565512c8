"""Several servers of one model behind one address, on a Ray cluster.

Ray Serve starts replicas, spreads requests over them, and replaces those that die; each replica is the app of
`create_app`. From the command line, settings are the fields of `RaySettings`:

    serve run layerskip.serving.ray_app:build_app model=demo num_replicas=2

From Python:

    from ray import serve
    serve.run(build_app({"model": "demo", "num_replicas": 2}))

Ray's router that looks at prompts (`PrefixCacheAffinityRouter`) isn't used: it belongs to `ray[llm]`, which can't be
imported without vLLM or SGLang, and it finds prompts in the arguments of Python calls only, not in HTTP requests.
`routing=session` keeps the requests of a conversation on one replica, so that its prefix cache is of use.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, get_args

from layerskip.checks import finite_number, whole_number
from layerskip.errors import InvalidArgumentError, LayerSkipError
from layerskip.serving.config import ServerConfig
from layerskip.workers.ray import import_ray

if TYPE_CHECKING:
    from fastapi import FastAPI

Routing = Literal["balanced", "session"]
SESSION_ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
HEALTH_SECONDS = 5.0
"""Seconds between two looks at whether a replica is well."""
CONSTRUCTOR_RETRIES = 3
"""Times that a replica is made again when the model can't be loaded: a bad name must come to an end."""
TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
READERS: Mapping[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    bool: lambda text: TRUTHS[text.lower()],
    Path: Path,
}
"""Values that are given as text, by the type of their field; others are text."""


@dataclass(frozen=True, kw_only=True)
class RaySettings:
    """What to serve on a cluster, and how many times."""

    model: str
    """Name or folder of the model, as every machine of the cluster knows it."""
    num_replicas: int = 1
    """Replicas; with `max_replicas` those to start with, and the fewest."""
    max_replicas: int | None = None
    """Most replicas: Ray adds some while more requests are open than `target_requests`, and takes them away again. The
    number stays as it is if not given."""
    target_requests: float | None = None
    """Requests open on each replica that Ray aims at; `max_concurrency` if not given."""
    num_cpus: int = 1
    """CPU cores, and torch's threads, of each replica."""
    num_gpus: int = 0
    """GPUs of each replica: 0 or 1."""
    routing: Routing = "balanced"
    """balanced: to the one of two replicas that has less to do. session: requests with the same `x-session-id` header
    to the same replica, which has their prefix in its cache."""
    dtype: str | None = None
    """Type of the weights; as `layerskip serve` chooses it if not given."""
    served_name: str | None = None
    """What the model is called; its own name if not given."""
    api_key_file: Path | None = None
    """File with the keys that clients may use, at the same place on every machine."""
    insecure: bool = False
    """Let everyone in without a key who reaches Ray's proxies, by whatever name. If false and without keys, only
    clients on the proxies' own machine are answered."""
    max_concurrency: int = 16
    """Texts that each replica generates at once."""
    max_queue: int = 64
    """Requests that may wait at each replica, and as many at each proxy."""
    max_model_len: int | None = None
    """Tokens of a prompt and its answer together."""
    cache_memory: float | None = None
    """GiB of each replica for keys and values; a share of the free memory if not given, which replicas on one machine
    would have to divide among them."""
    request_timeout: float = 600.0
    """Seconds after which a request is given up."""
    drain_timeout: float = 30.0
    """Seconds that a replica's requests have to end when it is taken away."""
    log_prompts: bool = False
    """Write prompts and answers into the replicas' logs as well."""
    otlp_endpoint: str | None = None
    """Where OpenTelemetry sends traces; none are made if not given."""

    def __post_init__(self) -> None:
        """Check what `ServerConfig` doesn't.

        Raises:
            InvalidArgumentError: Naming the field, its value and what is allowed.
        """
        whole_number("num_replicas", self.num_replicas, least=1)
        whole_number("num_cpus", self.num_cpus, least=1)
        whole_number("num_gpus", self.num_gpus, least=0, most=1)
        if self.max_replicas is not None:
            whole_number("max_replicas", self.max_replicas, least=self.num_replicas)
        elif self.target_requests is not None:
            raise InvalidArgumentError("target_requests says when replicas are added; give max_replicas as well")
        if self.target_requests is not None:
            finite_number("target_requests", self.target_requests, "above 0", lambda x: x > 0)
        if self.routing not in get_args(Routing):
            raise InvalidArgumentError(f"routing must be one of {', '.join(get_args(Routing))}, got {self.routing!r}")
        self.server_config()

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> "RaySettings":
        """Settings from names and values; values may be text, as on a command line.

        Raises:
            InvalidArgumentError: An unknown name, a missing one, or a value that can't be used.
        """
        kinds: dict[str, Any] = {field.name: field.type for field in fields(cls)}
        unknown = sorted(set(given) - set(kinds))
        if unknown:
            raise InvalidArgumentError(
                f"there is no setting {unknown[0]!r} of layerskip on Ray Serve; there are {', '.join(kinds)}"
            )
        if "model" not in given:
            raise InvalidArgumentError("the setting model is missing: the name or the folder of a model, as model=demo")
        return cls(**{name: _parse(name, value, kinds[name]) for name, value in given.items()})

    def server_config(self) -> ServerConfig:
        """The configuration of each replica; where Ray's proxies listen is Ray's to say."""
        return ServerConfig(
            host="0.0.0.0" if self.insecure else "127.0.0.1",
            insecure=self.insecure,
            api_key_file=self.api_key_file,
            served_name=self.served_name,
            max_concurrency=self.max_concurrency,
            max_queue=self.max_queue,
            max_model_len=self.max_model_len,
            cache_memory=self.cache_memory,
            request_timeout=self.request_timeout,
            drain_timeout=self.drain_timeout,
            log_prompts=self.log_prompts,
            otlp_endpoint=self.otlp_endpoint,
        )


def build_app(args: dict[str, Any]) -> Any:
    """The application for `serve run` and `serve.run`.

    Args:
        args: Fields of `RaySettings` by name.

    Returns:
        A Ray Serve application.

    Raises:
        InvalidArgumentError: Ray Serve is missing, or a setting can't be used.
    """
    return bind(RaySettings.parse(args))


def bind(settings: RaySettings) -> Any:
    """A Ray Serve application that runs by these settings.

    Raises:
        InvalidArgumentError: Ray Serve is missing.
    """
    serve = import_serve()
    # Requests beyond these wait at the proxies, and beyond max_queue there get status 503.
    room = settings.max_concurrency + settings.max_queue
    options: dict[str, Any] = {
        # A name of its own for each routing: Ray's proxies keep the router of a deployment that they know.
        "name": "layerskip" if settings.routing == "balanced" else f"layerskip_{settings.routing}",
        "max_ongoing_requests": room,
        "max_queued_requests": settings.max_queue,
        "ray_actor_options": {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        "graceful_shutdown_timeout_s": settings.drain_timeout,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_constructor_retry_count": CONSTRUCTOR_RETRIES,
        "health_check_period_s": HEALTH_SECONDS,
        "health_check_timeout_s": 30.0,
    }
    if settings.max_replicas is None:
        options["num_replicas"] = settings.num_replicas
    else:
        options["autoscaling_config"] = {
            "min_replicas": settings.num_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target_requests or float(settings.max_concurrency),
        }
    if settings.routing == "session":
        options["request_router_config"] = {"request_router_class": SESSION_ROUTER}
    # Replicas are given only what they have to know, so that a configuration file that sets this deployment's
    # num_replicas leaves those alone that run.
    return (
        serve.deployment(serve.ingress()(Replica))
        .options(**options)
        .bind(settings.model, settings.server_config(), dtype=settings.dtype, num_threads=settings.num_cpus)
    )


def import_serve() -> Any:
    """Import Ray Serve, with Ray's usage reports disabled.

    Raises:
        InvalidArgumentError: It isn't installed, or too old.
    """
    import_ray()
    try:
        from ray import serve
    except ImportError as error:
        raise InvalidArgumentError(
            f"Ray Serve is not installed here ({error}): pip install 'layerskip[serve,ray]'"
        ) from error
    return serve


class Replica:
    """One server on the cluster; Ray Serve makes it, in a process of its own."""

    def __init__(self, model: str, config: ServerConfig, *, dtype: str | None = None, num_threads: int = 1) -> None:
        """Load the model.

        Args:
            model: Its name or folder.
            config: How to serve it.
            dtype: Type of the weights.
            num_threads: Threads of torch.

        Raises:
            RuntimeError: It can't be loaded; Ray reports it.
        """
        import torch

        from layerskip.language_model import load
        from layerskip.serving.run import SWITCH_SECONDS

        _begin_log()
        sys.setswitchinterval(SWITCH_SECONDS)
        torch.set_num_threads(num_threads)
        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        self._config = config
        try:
            self._lm = load(model, **options)
        except LayerSkipError as error:
            raise RuntimeError(f"layerskip can't serve {model!r}: {error}") from error
        self._app: FastAPI | None = None

    def __serve_build_asgi_app__(self) -> "FastAPI":
        """Ray asks for the app once the replica is made."""
        from layerskip.serving.app import create_app

        self._app = create_app(self._lm, self._config)
        return self._app

    def check_health(self) -> None:
        """Ray asks every few seconds, and replaces a replica that isn't well.

        Raises:
            RuntimeError: The engine has stopped.
        """
        if self._app is not None and not self._app.state.service.scheduler.is_ready:
            raise RuntimeError("the engine of this replica has stopped")


def _begin_log() -> None:
    """Write the server's log to standard error, of which Ray makes a file for each replica."""
    log = logging.getLogger("layerskip.serving")
    log.setLevel(logging.INFO)
    log.propagate = False
    if not log.handlers:
        log.addHandler(logging.StreamHandler())


def _parse(name: str, value: Any, kind: Any) -> Any:
    """A value as its field has it; text is read as the field's type."""
    kinds = [one for one in get_args(kind) if one is not NoneType] if isinstance(kind, UnionType) else [kind]
    if not isinstance(value, str) or kinds == [str]:
        return value
    if isinstance(kind, UnionType) and value.lower() in ("", "none"):
        return None
    try:
        return READERS.get(kinds[0], str)(value)
    except (ValueError, KeyError):
        wanted = {int: "a whole number", float: "a number", bool: "true or false"}[kinds[0]]
        raise InvalidArgumentError(f"{name} must be {wanted}, got {value!r}") from None
