"""A model card of measured results: a section for what was measured, and none for what wasn't."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerskip.export.hub.results import Agreement, Benchmark, Measured, Recommendation

TAGS = ("layerskip", "early-exit", "self-speculative-decoding")


def make_card(folder: Path, repo: str, measured: Measured) -> str:
    """README.md of a repository.

    A README.md in the folder comes first, with its metadata; sections of results follow.

    Args:
        folder: What is uploaded.
        repo: `owner/name`.
        measured: What is known of the model.
    """
    from huggingface_hub import CardData, ModelCard, ModelCardData

    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8").strip() if readme.is_file() else ""
    metadata: CardData = ModelCardData()
    if text.startswith("---\n"):
        own = ModelCard(text, ignore_metadata_errors=True)
        text, metadata = own.text.strip(), own.data
    metadata["tags"] = list(dict.fromkeys([*(metadata.get("tags") or []), *TAGS]))
    defaults = {}
    if (folder / "config.json").is_file():
        defaults = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if measured.adapter_base is not None and measured.adapter_base.count("/") == 1:
        defaults["base_model"] = measured.adapter_base
    for key, value in defaults.items():
        metadata[key] = metadata.get(key) or value
    sections = [text or _introduction(folder, repo, measured), _use(folder, repo, measured), *_sections(measured)]
    return f"---\n{metadata.to_yaml()}\n---\n" + "\n\n".join(section for section in sections if section) + "\n"


def _sections(measured: Measured) -> list[str]:
    """The results."""
    return [
        _section("Agreement by exit", [_agreement(each) for each in measured.agreements]),
        _section("Recommended settings", [_recommendation(each) for each in measured.recommendations]),
        _section("Speed", [_benchmark(each) for each in measured.benchmarks]),
        _settings("Training recipe", measured.recipe),
        _settings("Training of the exit adapters", measured.adapter_training),
    ]


def _section(title: str, parts: Sequence[str]) -> str:
    return f"## {title}\n" + "\n\n".join(parts) if parts else ""


def _introduction(folder: Path, repo: str, measured: Measured) -> str:
    name = repo.partition("/")[2]
    if not (folder / "config.json").is_file() and not any(folder.glob("*.gguf")):
        return f"# {name}\nExit adapters for {measured.adapter_base}: blocks at early exits of the model, which draft."
    if measured.recipe:
        return (
            f"# {name}\nA model whose early layers can predict, trained with the LayerSkip recipe (arXiv:2404.16710)."
        )
    return f"# {name}\nA model for self-speculative decoding: its first layers draft, and the others verify."


def _use(folder: Path, repo: str, measured: Measured) -> str:
    """The command that generates with the recommended setting, if there is one."""
    options = ""
    if measured.recommendations:
        best = measured.recommendations[-1]
        options = f" --exit-layer {best.exit_layer} --num-speculations {best.num_speculations}"
    if not (folder / "config.json").is_file():  # the hub's adapters and GGUF files are named by where they lie
        model = measured.adapter_base or "MODEL"
        files = sorted(path.name for path in folder.glob("*.gguf"))
        download = f"hf download {repo} --local-dir {repo.partition('/')[2]}"
        place = repo.partition("/")[2]
        run = f"--model {place}/{files[0]}" if files else f"--model {model} --exit-adapters {place}"
        return f"## Use\n```sh\n{download}\nlayerskip generate {run}{options} --prompt TEXT\n```"
    return f"## Use\n```sh\nlayerskip generate --model {repo}{options} --prompt TEXT\n```"


def _agreement(agreement: Agreement) -> str:
    with_loss = any(each.loss is not None for each in agreement.exits)
    header = ["exit layer", *(["loss (nats a token)"] if with_loss else []), "agreement with the last layer"]
    rows = [
        [
            str(each.exit_layer),
            *([f"{each.loss:.3f}" if each.loss is not None else ""] if with_loss else []),
            f"{each.agreement:.1%}",
        ]
        for each in agreement.exits
    ]
    return f"{_on(agreement.source)}{_table(header, rows)}"


def _recommendation(best: Recommendation) -> str:
    measured = f" ({best.source})" if best.source else ""
    return (
        f"Exit layer {best.exit_layer} with {best.num_speculations} drafts: {best.tokens_per_second:.1f} tokens/s, "
        f"{best.speedup:.2f} times autoregressive decoding{measured}."
    )


def _benchmark(benchmark: Benchmark) -> str:
    rows = []
    for row in benchmark.strategies:
        interval = f" ({row.low:.2f} to {row.high:.2f})" if row.low is not None and row.high is not None else ""
        speedup = "" if row.speedup is None else f"{row.speedup:.2f}{interval}"
        accepted = "" if row.acceptance_rate is None else f"{row.acceptance_rate:.1%}"
        rows.append([row.name, f"{row.tokens_per_second:.1f}", speedup, accepted])
    header = ["strategy", "tokens/s", "speedup (95 % interval)", "accepted drafts"]
    return f"{_on(benchmark.source)}{_table(header, rows)}"


def _on(source: str) -> str:
    """The line above a table that says what it was measured on."""
    return f"Measured on: {source}.\n\n" if source else ""


def _settings(title: str, settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    rows = [[name.replace("_", " "), _shown(value)] for name, value in sorted(settings.items())]
    return _section(title, [_table(["setting", "value"], rows)])


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text.replace("|", r"\|").replace("\n", " ")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
