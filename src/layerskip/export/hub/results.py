"""What was measured of a model, from the files that this package's commands write."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from layerskip.checkpoint.exit_adapters import DESCRIPTION_FILE, has_adapters, read_adapters
from layerskip.checkpoint.folder import TUNED_FILE
from layerskip.checkpoint.json_file import read_json
from layerskip.errors import CheckpointError, InvalidArgumentError

RESULTS_FILE, TRAINING_FILE, CONFIG_FILE = "results.json", "training.json", "config.json"
Result = TypeVar("Result")
KINDS = (
    "a folder of layerskip benchmark or sweep (or its results.json), the output of layerskip inspect --json, "
    "layerskip.json of a sweep with --save, training.json of layerskip train, or exit_adapters.json"
)
"""Files that are understood, for messages."""


@dataclass(frozen=True, kw_only=True)
class ExitAgreement:
    """Quality of one exit."""

    exit_layer: int
    agreement: float
    """Share of tokens on which it agrees with the last layer."""
    loss: float | None = None
    """Nats a token; None where it wasn't measured."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Quality of exits on one text."""

    exits: tuple[ExitAgreement, ...]
    source: str
    """What it was measured on, in words."""


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The setting that a sweep found best."""

    exit_layer: int
    num_speculations: int
    tokens_per_second: float
    speedup: float
    source: str


@dataclass(frozen=True, kw_only=True)
class StrategySpeed:
    """Speed of one strategy."""

    name: str
    tokens_per_second: float
    speedup: float | None
    low: float | None
    high: float | None
    """Ends of the 95 % interval of the speedup."""
    acceptance_rate: float | None
    """Accepted drafts, of all; None where nothing drafts."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Strategies side by side."""

    strategies: tuple[StrategySpeed, ...]
    source: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that is known of a model; what wasn't measured is empty."""

    agreements: tuple[Agreement, ...] = ()
    recommendations: tuple[Recommendation, ...] = ()
    benchmarks: tuple[Benchmark, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """The training record of config.json."""
    adapter_training: Mapping[str, Any] = field(default_factory=dict)
    """How exit adapters were trained."""
    adapter_base: str | None = None
    """What exit adapters were trained for."""

    def __add__(self, other: "Measured") -> "Measured":
        """Both together, each result once; a training record of `other` counts where both have one."""
        return Measured(
            agreements=_each_once(self.agreements, other.agreements),
            recommendations=_each_once(self.recommendations, other.recommendations),
            benchmarks=_each_once(self.benchmarks, other.benchmarks),
            recipe=other.recipe or self.recipe,
            adapter_training=other.adapter_training or self.adapter_training,
            adapter_base=other.adapter_base or self.adapter_base,
        )


def read_folder(folder: Path) -> Measured:
    """What the files beside a model say: the training record, a sweep's best setting, exit adapters.

    Raises:
        CheckpointError: A file is damaged.
    """
    measured = Measured()
    if (folder / CONFIG_FILE).is_file():
        recipe = read_json(folder / CONFIG_FILE).get("layerskip")
        measured = replace(measured, recipe=recipe if isinstance(recipe, Mapping) else {})
    files = [folder / TUNED_FILE, folder / TRAINING_FILE, folder / DESCRIPTION_FILE]
    found = [read_results(file) for file in files if file.is_file()]
    found += [read_results(path / DESCRIPTION_FILE) for path in sorted(folder.glob("*.exit-adapters"))]
    found += [read_results(path) for path in sorted(folder.glob(f"*.{TUNED_FILE}"))]
    return sum(found, measured)


def read_results(path: Path) -> Measured:
    """What one file or run's folder says.

    Raises:
        InvalidArgumentError: There is no such file, or it is of no known kind.
        CheckpointError: It is damaged.
    """
    path = path.expanduser()
    if path.is_dir():
        path /= RESULTS_FILE
    if not path.is_file():
        raise InvalidArgumentError(f"there are no results in {path}; give {KINDS}")
    if path.name == DESCRIPTION_FILE and has_adapters(path.parent):
        return _adapters(path.parent)
    content = read_json(path)
    for keys, read in _READERS:
        if keys <= set(content):
            try:
                return read(content)
            except InvalidArgumentError:
                raise
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(f"{path} is damaged ({error!r}); measure again") from error
    raise InvalidArgumentError(f"{path} holds no results that a model card can show; give {KINDS}")


def _each_once(first: tuple[Result, ...], second: tuple[Result, ...]) -> tuple[Result, ...]:
    return tuple(dict.fromkeys((*first, *second)))


def _adapters(folder: Path) -> Measured:
    adapters = read_adapters(folder)
    known = [
        ExitAgreement(exit_layer=adapter.exit_layer, agreement=adapter.agreement)
        for adapter in adapters.adapters
        if adapter.agreement is not None
    ]
    agreement = Agreement(exits=tuple(known), source="exit adapters on held-out tokens of their training data")
    return Measured(
        agreements=(agreement,) if known else (),
        adapter_training=adapters.training,
        adapter_base=adapters.base.name,
    )


def _inspected(content: Mapping[str, Any]) -> Measured:
    source = f"a text of {content['num_tokens']} tokens"
    return Measured(agreements=(Agreement(exits=_exits(content["exits"]), source=source),))


def _trained(content: Mapping[str, Any]) -> Measured:
    if not content["exits"]:
        return Measured()
    return Measured(agreements=(Agreement(exits=_exits(content["exits"]), source="held-out training data"),))


def _tuned(content: Mapping[str, Any]) -> Measured:
    origin = content.get("source", {})
    source = _origin(origin.get("dataset"), origin)
    return Measured(
        agreements=_by_exit(content.get("agreement", {}), source),
        recommendations=(
            Recommendation(
                exit_layer=int(content["exit_layer"]),
                num_speculations=int(content["num_speculations"]),
                tokens_per_second=float(content["tokens_per_second"]),
                speedup=float(content["speedup"]),
                source=source,
            ),
        ),
    )


def _run(content: Mapping[str, Any]) -> Measured:
    """results.json of a run."""
    results, machine = content["results"], content["machine"]
    asked = content["configuration"]
    source = _origin(asked.get("data_path") or asked["dataset"], machine)
    match content["kind"]:
        case "sweep":
            best = {**results["best"], "source": {}, "agreement": results["agreement"]}
            found = _tuned(best)
            return Measured(
                agreements=tuple(replace(each, source=source) for each in found.agreements),
                recommendations=tuple(replace(each, source=source) for each in found.recommendations),
            )
        case "benchmark":
            rows = tuple(_strategy(row) for row in results["strategies"])
            count = results["strategies"][0]["samples"]
            return Measured(benchmarks=(Benchmark(strategies=rows, source=f"{count} prompts, {source}"),))
        case kind:
            raise InvalidArgumentError(f"results of layerskip {kind} aren't part of a model card; give {KINDS}")


def _strategy(row: Mapping[str, Any]) -> StrategySpeed:
    return StrategySpeed(
        name=str(row["name"]),
        tokens_per_second=float(row["tokens_per_second"]),
        speedup=row["speedup"],
        low=row["speedup_low"],
        high=row["speedup_high"],
        acceptance_rate=float(row["acceptance_rate"]) if row["drafted_by_position"] else None,
    )


def _exits(rows: Sequence[Mapping[str, Any]]) -> tuple[ExitAgreement, ...]:
    return tuple(
        ExitAgreement(exit_layer=int(row["exit_layer"]), agreement=float(row["agreement"]), loss=float(row["loss"]))
        for row in rows
    )


def _by_exit(shares: Mapping[str, Any], source: str) -> tuple[Agreement, ...]:
    exits = [ExitAgreement(exit_layer=int(exit_layer), agreement=float(share)) for exit_layer, share in shares.items()]
    return (Agreement(exits=tuple(sorted(exits, key=lambda e: e.exit_layer)), source=source),) if exits else ()


def _origin(dataset: Any, machine: Mapping[str, Any]) -> str:
    """Data set, machine and date in words; of files no more than the name."""
    processor = machine.get("gpu") or machine.get("cpu")
    threads = f", {machine['threads']} threads" if machine.get("threads") and not machine.get("gpu") else ""
    parts = [
        Path(str(dataset)).name if dataset else "",
        f"{processor}{threads}" if processor else "",
        str(machine.get("date") or "")[:10],
    ]
    return ", ".join(part for part in parts if part)


_READERS: tuple[tuple[set[str], Callable[[Mapping[str, Any]], Measured]], ...] = (
    ({"kind", "configuration", "results", "machine"}, _run),
    ({"exits", "num_tokens", "model"}, _inspected),
    ({"exits", "speedups", "step"}, _trained),
    ({"exit_layer", "num_speculations", "speedup", "tokens_per_second"}, _tuned),
)
"""Keys by which a kind of file is recognised, and what reads it."""
