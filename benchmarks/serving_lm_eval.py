"""lm-evaluation-harness against a server and against the library: the same scores, and the same answers.

    pip install lm-eval tenacity
    python benchmarks/serving_lm_eval.py --limit 20
    python benchmarks/serving_lm_eval.py --model demo --limit 40

Tasks are made of questions in a file (grade-school mathematics with their answers): choices of results by
log-likelihood, texts, and the perplexity of the answers. The harness's `local-completions` asks `layerskip serve` for
all three, its `local-chat-completions` for texts, in the model's chat template; `layerskip eval` runs the same tasks
with the library. Scores must be equal, log-likelihoods within rounding.
"""

import json
import os
import random
import re
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from record import environment, processor, write_record
from rich.console import Console
from rich.table import Table
from serving_process import layerskip_server

import layerskip
from layerskip.evaluation.eval.model import make_model

CHOICE, WRITE, ROLLING = "local_choice", "local_write", "local_rolling"
NEAR = 1e-3
"""Most difference between two log-likelihoods of one text: its tokens may be read in other chunks."""
NO_DIFFERENCE = 1e-4
"""Most difference between two scores; those of log-likelihoods are rounded, too."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the benchmark."""

    data: Path
    """JSON lines with the fields question and answer, which ends with #### and a number."""
    model: str = "smollm2"
    limit: int = 20
    """Documents of each task."""
    max_tokens: int = 64
    """Tokens of texts."""
    clients: int = 4
    """Requests that the harness sends at once."""
    threads: int = 2
    json: bool = False
    """Print JSON instead of a table."""


def write_tasks(arguments: Arguments, folder: Path) -> None:
    """Three tasks on the same documents, as the harness reads them."""
    pick, documents = random.Random(0), []
    for line in arguments.data.read_text("utf-8").splitlines()[: arguments.limit]:
        row = json.loads(line)
        working, _, result = row["answer"].partition("####")
        number = int(re.sub(r"[^\d-]", "", result) or 0)
        others = pick.sample([x for x in range(number - 9, number + 10) if x != number], 3)
        choices = [f" {value}" for value in sorted([number, *others])]
        documents.append(
            {
                "question": row["question"],
                "choices": choices,
                "gold": choices.index(f" {number}"),
                "result": str(number),
                "working": working.strip(),
            }
        )
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "target_delimiter": "",
    }
    question = "Question: {{question}}\nAnswer:"
    tasks: dict[str, dict[str, Any]] = {
        CHOICE: {
            "output_type": "multiple_choice",
            "doc_to_text": question,
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        WRITE: {
            "output_type": "generate_until",
            "doc_to_text": question,
            "doc_to_target": "{{result}}",
            "generation_kwargs": {"until": ["Question:", "\n\n"], "max_gen_toks": arguments.max_tokens},
            "metric_list": [{"metric": "exact_match", "regexes_to_ignore": [r"[^\d]"]}],
        },
        ROLLING: {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{working}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }
    for name, settings in tasks.items():  # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **settings}))


def run_tasks(model: Any, tasks: list[str], folder: Path, *, chat: bool = False, **options: Any) -> dict[str, Any]:
    """The harness's results and samples."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    chats = {"apply_chat_template": True, "fewshot_as_multiturn": True} if chat else {}
    with redirect_stdout(sys.stderr):
        return dict(simple_evaluate(model=model, tasks=tasks, task_manager=manager, **options, **chats))


def scores_of(results: dict[str, Any]) -> dict[str, float]:
    """Scores by task and metric, without standard errors."""
    return {
        f"{task} {metric.removesuffix(',none')}": value
        for task, values in results["results"].items()
        for metric, value in values.items()
        if "," in metric and isinstance(value, int | float) and "_stderr" not in metric
    }


def answers_of(results: dict[str, Any], task: str) -> list[Any]:
    """What the model answered to a task's requests, in the documents' order."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [answer for sample in samples for answer in sample["resps"]]


def compare(ours: dict[str, Any], theirs: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
    """What is equal of two runs.

    Args:
        ours: The library's.
        theirs: The server's.
        tasks: Those that both ran.
    """
    pairs = {task: list(zip(answers_of(ours, task), answers_of(theirs, task), strict=True)) for task in tasks}
    scores = {name: (value, scores_of(theirs)[name]) for name, value in scores_of(ours).items()}
    found: dict[str, Any] = {"scores": scores, "answers": {task: len(each) for task, each in pairs.items()}}
    checks = {"scores": all(abs(a - b) <= NO_DIFFERENCE * max(1, abs(a)) for a, b in scores.values())}
    if WRITE in pairs:
        found["other_texts"] = [(a[0], b[0]) for a, b in pairs[WRITE] if a[0] != b[0]]
        checks["texts"] = not found["other_texts"]
    if CHOICE in pairs:
        numbers = [(float(a[0][0]), float(b[0][0])) for a, b in pairs[CHOICE]]
        found["largest_difference_of_log_likelihoods"] = max(abs(a - b) for a, b in numbers)
        checks["log-likelihoods"] = found["largest_difference_of_log_likelihoods"] <= NEAR
        checks["which are greedy"] = all(str(a[0][1]) == str(b[0][1]) for a, b in pairs[CHOICE])
    return {**found, "checks": checks}


def measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Run everything."""
    torch.set_num_threads(arguments.threads)
    lm = layerskip.load(arguments.model, device="cpu")
    write_tasks(arguments, folder)
    tokenizer = folder / "tokenizer"
    lm.tokenizer.save_pretrained(tokenizer)
    adds_bos = bool(lm.tokenizer.bos_token_id in lm.tokenizer("x")["input_ids"])
    all_tasks, has_chat = [CHOICE, WRITE, ROLLING], bool(lm.tokenizer.chat_template)
    library = run_tasks(make_model(lm, lm.decoder.num_layers), all_tasks, folder)
    if has_chat:
        chats = run_tasks(make_model(lm, lm.decoder.num_layers), [WRITE], folder, chat=True)
    with layerskip_server(arguments.model, folder / "server.log", threads=arguments.threads) as server:
        common = {"model": server.facts["model"], "num_concurrent": arguments.clients, "max_retries": 1}
        length = server.facts["max_model_len"]
        options = {**common, "max_length": length, "tokenizer": str(tokenizer), "add_bos_token": adds_bos}
        options |= {"base_url": f"{server.address}/v1/completions", "tokenizer_backend": "huggingface"}
        served = run_tasks("local-completions", all_tasks, folder, model_args=options)
        found = {"local-completions": compare(library, served, all_tasks)}
        if has_chat:
            options = {**common, "base_url": f"{server.address}/v1/chat/completions"}
            served = run_tasks("local-chat-completions", [WRITE], folder, chat=True, model_args=options)
            found["local-chat-completions"] = compare(chats, served, [WRITE])
    return found


def main(arguments: Arguments) -> None:
    """Measure, print and record; exit with 1 where scores or answers differ."""
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"  # requests and aiohttp heed it
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(arguments, Path(scratch))
    content = {"arguments": json.loads(json.dumps(asdict(arguments), default=str)), "models": found}
    path = write_record("serving_lm_eval", content)
    if arguments.json:
        print(json.dumps({"environment": environment(), **content}, indent=2))
    else:
        console = Console()
        for name, each in found.items():
            table = Table(name, "layerskip eval", "server")
            for score, (ours, theirs) in each["scores"].items():
                table.add_row(score, f"{ours:.6g}", f"{theirs:.6g}")
            console.print(table)
            console.print({key: value for key, value in each.items() if key not in ("scores", "other_texts")})
            for ours, theirs in each.get("other_texts", [])[:3]:
                console.print(f"[red]other text:[/red] {ours!r}\n{theirs!r}", markup=True)
        console.print(f"{processor()}; record: {path}")
    sys.exit(0 if all(ok for each in found.values() for ok in each["checks"].values()) else 1)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
