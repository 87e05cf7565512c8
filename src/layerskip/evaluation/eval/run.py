"""EleutherAI's lm-evaluation-harness (`lm_eval`) on our engine, at one exit after another.

    model.py     our engine as the harness's model
    scoring.py   log-likelihoods
    options.py   how tasks want their texts
    answers.py   finished requests, kept as they come
    shards.py    requests shared out over workers

Every exit is evaluated as if the model ended there. Log-likelihoods of all exits take one pass, which speculation can't
make faster; texts of the whole network are the same with any strategy, up to rounding.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerskip.decoding.config import GenerationConfig
from layerskip.errors import InvalidArgumentError, LayerSkipError
from layerskip.evaluation.eval.model import make_model, require_harness
from layerskip.evaluation.eval.options import writing_config
from layerskip.evaluation.progress import Progress, ignore_progress
from layerskip.evaluation.run_folder import RunFolder
from layerskip.evaluation.samples import SampleStore
from layerskip.language_model import LanguageModel
from layerskip.machine import describe_machine
from layerskip.text.chat_template import require_template

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

NOISY = ("lm_eval", "datasets", "fsspec", "huggingface_hub", "evaluate", "transformers")
"""Loggers whose remarks don't concern the user."""


@dataclass(frozen=True, kw_only=True)
class ExitScores:
    """The model that ends after some layers."""

    exit_layer: int
    tasks: dict[str, dict[str, float | None]]
    """By task or group, and by metric as the harness calls it (`acc,none`, `acc_stderr,none`); None if not a number."""
    speed: dict[str, float]
    """`tokens_per_second`, `acceptance_rate`, ... of texts, `tokens_scored_per_second` of log-likelihoods."""


@dataclass(frozen=True, kw_only=True)
class EvalReport:
    """Scores of every exit."""

    exits: list[ExitScores]
    scores: bool
    """Whether the tasks ask for log-likelihoods."""
    writes: bool
    """Whether the tasks ask for texts."""

    def results(self) -> dict[str, Any]:
        """What results.json has of it."""
        exits = [{"exit_layer": e.exit_layer, "tasks": e.tasks, "speed": e.speed} for e in self.exits]
        return {"exits": exits}


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks by name, not loaded yet."""

    names: list[str]
    manager: "TaskManager"


def find_tasks(tasks: Sequence[str], include_path: Path | None = None) -> Tasks:
    """Look tasks up by name, pattern (`mmlu_*`) or YAML file.

    Args:
        tasks: The harness's names, or those of `include_path`.
        include_path: A folder of further tasks in YAML.

    Raises:
        InvalidArgumentError: No tasks, one that isn't known, no such folder, or no lm-eval.
    """
    require_harness()
    if not tasks:
        raise InvalidArgumentError("no tasks were given; name at least one, such as arc_easy")
    if include_path is not None and not include_path.is_dir():
        raise InvalidArgumentError(f"include_path {include_path} is no folder; name one with tasks in YAML")
    from lm_eval.tasks import TaskManager

    with _quiet():
        if include_path is not None:  # the harness's own tasks are thousands of files, which take seconds to list
            own = TaskManager(include_path=str(include_path), include_defaults=False)
            if all(task in own.all_subtasks for task in tasks):
                return Tasks(names=list(dict.fromkeys(tasks)), manager=own)
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
        names = [name for task in tasks for name in _match(task, manager)]
    return Tasks(names=list(dict.fromkeys(names)), manager=manager)


def _match(task: str, manager: "TaskManager") -> list[str]:
    if Path(task).suffix in (".yaml", ".yml") and Path(task).is_file():
        return [task]
    names = [task] if task in manager.all_tasks else list(manager.match_tasks([task]))
    if not names:
        close = get_close_matches(task, manager.all_tasks, n=3)
        advice = f"did you mean {' or '.join(map(repr, close))}?" if close else "include_path adds tasks of your own"
        raise InvalidArgumentError(f"task {task!r} is not known; {advice}")
    return names


def evaluate(
    lm: LanguageModel,
    tasks: Sequence[str] | Tasks,
    *,
    exit_layers: Sequence[int] | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    config: GenerationConfig | None = None,
    apply_chat_template: bool = False,
    output: RunFolder | None = None,
    store: SampleStore | None = None,
    on_progress: Progress = ignore_progress,
) -> EvalReport:
    """Run tasks at one or more exits.

    Args:
        lm: The model.
        tasks: Names, or what `find_tasks` returned.
        exit_layers: Exits to evaluate (1..L); all layers only if not given.
        include_path: A folder of further tasks in YAML.
        limit: Most documents of each task.
        num_fewshot: Solved examples in each prompt; the task's own number if not given.
        batch_size: Texts to write together; log-likelihoods are computed one context at a time.
        config: Strategy, drafts and seed of texts of the whole network; earlier exits write one token a step. Length,
            stop strings and sampling are the tasks' own.
        apply_chat_template: Put prompts into the tokenizer's chat template, examples as turns of the conversation.
        output: Keeps every finished request; the results, and the harness's own files for each exit, are written
            there in the end.
        store: Keeps finished requests where no folder does.
        on_progress: Told after each request.

    Raises:
        InvalidArgumentError: An argument, a task or a task's option that can't be used, or no lm-eval.
        TokenizerError: No tokenizer, or no chat template where one is asked for.
        PromptError: A continuation that can't be scored.
    """
    exits = [lm.decoder.num_layers] if exit_layers is None else list(dict.fromkeys(exit_layers))
    _check_arguments(lm, exits, config, limit, num_fewshot, apply_chat_template)
    chosen = tasks if isinstance(tasks, Tasks) else find_tasks(tasks, include_path)
    asked = {"limit": limit, "num_fewshot": num_fewshot, "apply_chat_template": apply_chat_template}
    with _quiet(), _machine_described_once():
        loaded = _load(chosen)
        answers = output or store or SampleStore()
        scores = []
        for exit_layer in exits:
            model = make_model(
                lm,
                exit_layer,
                config=config,
                batch_size=batch_size,
                store=answers,
                scored_exits=exits,
                on_progress=on_progress,
            )
            results = _run(lm, model, loaded, chosen.manager, asked, output)
            scores.append(ExitScores(exit_layer=exit_layer, tasks=_metrics(results), speed=model.answers.speed()))
    kinds = {task.OUTPUT_TYPE for item in loaded for task in _leaves(item)}
    report = EvalReport(exits=scores, scores=bool(kinds - {"generate_until"}), writes="generate_until" in kinds)
    if output is not None:
        output.finish(report.results())
    return report


def _check_arguments(
    lm: LanguageModel,
    exits: Sequence[int],
    config: GenerationConfig | None,
    limit: int | None,
    num_fewshot: int | None,
    apply_chat_template: bool,
) -> None:
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InvalidArgumentError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if not exits:
        raise InvalidArgumentError("no exit layers were given; give at least one, or none for all layers")
    for exit_layer in exits:
        writing_config(lm, exit_layer, config)
    if apply_chat_template:
        require_template(lm.tokenizer, lm.checkpoint.name)


def _load(tasks: Tasks) -> list[Any]:
    """Tasks and groups with their documents, once for all exits."""
    loaded: list[Any] = []
    for name in tasks.names:
        try:
            content = tasks.manager.load([name])
        except LayerSkipError:
            raise
        except Exception as error:  # tasks are files of others and may fetch data: nearly anything is raised here
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InvalidArgumentError(f"task {name!r} can't be loaded: {reason[:400]}") from error
        inner = {child for names in content.get("group_map", {}).values() for child in names}
        groups, single = content.get("groups", {}), content["tasks"]
        for task in single.values():
            _check(task)
        grouped = {task.task_name for group in groups.values() for task in _leaves(group)}
        loaded += [group for name, group in groups.items() if name not in inner]
        loaded += [task for name, task in single.items() if name not in grouped]
    return loaded


def _leaves(item: Any) -> list[Any]:
    """The tasks of a group, or the task itself."""
    return list(item.get_all_tasks()) if hasattr(item, "get_all_tasks") else [item]


def _check(task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise InvalidArgumentError(
            f"task {task.task_name!r} runs programs that the model writes, which isn't done here; "
            "layerskip benchmark --dataset human_eval --execute-code does that in processes with limits"
        )
    if getattr(task, "MULTIMODAL", False):
        raise InvalidArgumentError(f"task {task.task_name!r} has images or sound; this engine reads text only")


def _run(
    lm: LanguageModel,
    model: Any,
    loaded: list[Any],
    manager: "TaskManager",
    asked: Mapping[str, Any],
    output: RunFolder | None,
) -> dict[str, Any]:
    """The harness's results of one exit, written into the run's folder if there is one."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker()
    results: dict[str, Any] = simple_evaluate(
        model=model,
        model_args={"pretrained": lm.checkpoint.name, "exit_layer": model.exit_layer},
        tasks=loaded,
        task_manager=manager,
        batch_size=model.batch_size,
        device=str(lm.decoder.device),
        evaluation_tracker=tracker,
        fewshot_as_multiturn=asked["apply_chat_template"],
        **asked,
    )
    samples = results.pop("samples")
    if output is not None:
        _write_files(tracker, output.path / f"exit_{model.exit_layer}", results, samples)
    return results


def _write_files(tracker: Any, folder: Path, results: dict[str, Any], samples: dict[str, Any]) -> None:
    """The harness's own files, in place of those of an earlier run."""
    for pattern in ("*/results_*.json", "*/samples_*.jsonl"):
        for file in folder.glob(pattern):
            file.unlink()
    tracker.output_path = str(folder)
    tracker.save_results_aggregated(results=dict(results), samples=samples)
    for task, records in samples.items():
        tracker.save_results_samples(task_name=task, samples=records)
    if not any(folder.glob("*/results_*.json")):  # the harness only logs that it couldn't
        raise InvalidArgumentError(f"the harness's results can't be written to {folder}; name another output_dir")


def _metrics(results: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Numbers by task or group and metric; those that aren't finite are None, as JSON has none of them."""
    return {
        task: {
            metric: float(value) if math.isfinite(value) else None
            for metric, value in values.items()
            if "," in metric and isinstance(value, int | float)
        }
        for task, values in results["results"].items()
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's and its libraries' remarks, bars and prints off the terminal."""
    bars = import_module("tqdm").tqdm
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    draw = bars.__init__

    def draw_nothing(bar: Any, *args: Any, **options: Any) -> None:
        draw(bar, *args, **{**options, "disable": True})

    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(StringIO()))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(_replaced(bars, "__init__", draw_nothing))
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _machine_described_once() -> Iterator[None]:
    """The harness describes machine and commit in each of its results: pip takes seconds for it, and git complains."""
    from lm_eval import evaluator
    from torch.utils import collect_env

    commit = describe_machine()["commit"]
    with (
        _replaced(collect_env, "get_pretty_env_info", cache(collect_env.get_pretty_env_info)),
        _replaced(evaluator, "get_git_commit_hash", lambda: commit),
    ):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
