"""`layerskip serve`: an OpenAI-compatible server."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import UseAppendAction, arg

from layerskip.cli.exit_code import ExitCode
from layerskip.cli.flags.arguments import ModelArguments, OutputArguments, Switch, parse
from layerskip.cli.terminal.terminal import load_model, make_console, progress
from layerskip.errors import InvalidArgumentError
from layerskip.files import to_json

if TYPE_CHECKING:
    from layerskip.serving.config import ServerConfig
    from layerskip.serving.service import Service

NEEDED = ("fastapi", "uvicorn", "httptools", "prometheus_client")


@dataclass(frozen=True, kw_only=True)
class ServeArguments:
    """Serve a model by OpenAI's API, with a page to try it at /.

    The server listens at this machine's own address, where no key is needed. Ctrl-C or SIGTERM lets running requests
    end; a second one ends at once. With --json, what it is told at the start and its log are lines of JSON.

    Examples:
        layerskip serve smollm2
        layerskip serve demo --port 9000 --max-concurrency 8 --cache-memory 2
        layerskip serve ./model --host 0.0.0.0 --api-key-file keys.txt
    """

    model: ModelArguments = field(default_factory=ModelArguments)
    host: str = "127.0.0.1"
    """Address to listen at; others than this machine's need --api-key-file or --insecure."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    api_key_file: Annotated[Path | None, arg(metavar="FILE")] = None
    """File with the keys that clients may use, one in each line."""
    insecure: Switch = False
    """Let other machines ask without a key."""
    allowed_host: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="NAME")] = ()
    """A further name by which clients may call this server, where no key is needed."""
    served_name: Annotated[str | None, arg(metavar="NAME")] = None
    """What the model is called; its own name if not given."""
    max_concurrency: int = 16
    """Texts that are generated at once."""
    max_queue: int = 64
    """Requests that may wait; others are refused with status 503."""
    max_model_len: Annotated[int | None, arg(metavar="N")] = None
    """Tokens of a prompt and its answer together; what the model and the memory allow if not given."""
    cache_memory: Annotated[float | None, arg(metavar="GiB")] = None
    """Memory for keys and values, reserved at the start; 0.4 of what is free (0.8 on a GPU) if not given."""
    request_timeout: float = 600.0
    """Seconds after which a request is given up."""
    drain_timeout: float = 30.0
    """Seconds that running requests have to end when the server is asked to stop."""
    log_prompts: Switch = False
    """Write prompts and answers into the log as well."""
    otlp_endpoint: Annotated[str | None, arg(metavar="URL")] = None
    """Where OpenTelemetry sends traces; none are made if not given."""
    output: OutputArguments = field(default_factory=OutputArguments)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    if argv and not argv[0].startswith("-"):
        argv = ["--model", *argv]
    arguments = parse(ServeArguments, "serve", argv)
    _check_installed()
    if arguments.model.tensor_parallel > 1:
        raise InvalidArgumentError("serve runs in one process; leave out --tensor-parallel")

    from layerskip.serving.run import bind

    config = server_config(arguments)
    listening = bind(config)
    lm = load_model(arguments.model, arguments.output)
    with progress(arguments.output, "starting the server"):
        from layerskip.serving.app import create_app
        from layerskip.serving.run import run as serve

        app = create_app(lm, config)
    _begin_log(arguments)
    serve(app, config, listening, lambda address: _tell(arguments, app.state.service, address))
    return ExitCode.DONE


def server_config(arguments: ServeArguments) -> "ServerConfig":
    """The server's configuration; raises as that does."""
    from layerskip.serving.config import ServerConfig

    names = {each.name for each in fields(ServerConfig)} & {each.name for each in fields(ServeArguments)}
    given: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    config = ServerConfig(**given, allowed_hosts=arguments.allowed_host)
    file = config.api_key_file
    return config if file is None else replace(config, api_key_file=file.expanduser())


def _check_installed() -> None:
    missing = next((name for name in NEEDED if find_spec(name) is None), None)
    if missing is not None:
        raise InvalidArgumentError(
            f"serving needs the package {missing!r}, which isn't installed: pip install 'layerskip[serve]'"
        )


def _begin_log(arguments: ServeArguments) -> None:
    """Write the server's log to standard error."""
    log = logging.getLogger("layerskip.serving")
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s" if arguments.output.json else "%(asctime)s %(message)s"))
    log.addHandler(handler)


def _tell(arguments: ServeArguments, service: "Service", address: str) -> None:
    """Say what is served, and where."""
    cache = service.cache
    facts = {
        "model": service.name,
        "address": address,
        "max_concurrency": cache.rows,
        "max_model_len": cache.capacity,
        "cache_bytes": cache.bytes,
        "exit_adapters": list(service.lm.decoder.adapted_exits),
    }
    if arguments.output.json:
        print(to_json(facts), flush=True)
        return
    console = make_console(arguments.output)
    console.print(f"{service.name} at {address}", style="bold", highlight=False, markup=False)
    console.print(
        f"{cache.rows} texts at once, of up to {cache.capacity} tokens; {cache.bytes / 2**30:.2f} GiB for their cache",
        highlight=False,
    )
    console.print(f"try it: {address}/   for programs: {address}/v1   the API: {address}/docs", highlight=False)
    console.file.flush()
