"""Two processes learn what one learns from the same batches: data parallel, and with the model sharded (FSDP2)."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import layerskip.training.run as run_module  # takes seconds: once here, not in each child
from layerskip.cli.main import main
from layerskip.training.config import LayerSkipConfig
from layerskip.training.output.checkpoints import list_checkpoints
from layerskip.training.recipe.recipe import LayerSkipRecipe
from layerskip.training.trainer import LayerSkipTrainer

TIMEOUT = 180.0
SETTINGS = """--sequence-length 32 --held-out 0.2 --max-steps 20 --save-steps 10 --eval-steps 10 --log-steps 1 --json
--rotation 2 --exit-loss kl --dropout-max 0.3 --dropout-schedule constant --learning-rate 1e-3
--precision float32""".split()


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def start(training_start: Callable[..., tuple[Path, Path]]) -> tuple[Path, Path]:
    return training_start(max_position_embeddings=64)


@pytest.fixture(scope="module")
def flags(start: tuple[Path, Path]) -> list[str]:
    return ["--config", str(start[0]), "--data", str(start[1]), *SETTINGS]


@pytest.fixture(scope="module")
def alone(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, with all of the global batch."""
    output = tmp_path_factory.mktemp("runs") / "alone"
    with redirect_stdout(io.StringIO()):
        assert main(["train", *flags, "--batch-size", "4", "--output", str(output)]) == 0
    return output


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def in_two_processes(run: Callable[[int], object]) -> None:
    """Run in two copies of this process, with the environment that torchrun gives to those that it starts.

    New ones would need ten seconds to import everything.
    """
    port, children, codes = free_port(), [], []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
                where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in (place | where).items()}
                forget_accelerate()
                run(rank)
                code = 0
            except BaseException:
                traceback.print_exc(file=open(2, "w", closefd=False))  # noqa: SIM115
            finally:
                os._exit(code)
        children.append(pid)
    deadline = time.monotonic() + TIMEOUT
    try:
        while children and time.monotonic() < deadline and not any(codes):
            for pid in list(children):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    children.remove(pid)
                    codes.append(os.waitstatus_to_exitcode(status))
            time.sleep(0.05)
    finally:
        for pid in children:  # those that wait for one that has failed
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert codes == [0, 0]


def forget_accelerate() -> None:
    """Accelerate keeps in a process that it is alone, once it was."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


def train(flags: list[str], output: Path, *more: str) -> Callable[[int], None]:
    def run(rank: int) -> None:
        with redirect_stdout(io.StringIO()) as out:
            assert main(["train", *flags, "--batch-size", "2", "--output", str(output), *more]) == 0
        lines = out.getvalue().splitlines()
        assert len(lines) == (1 if rank == 0 else 0)
        assert all(json.loads(line)["num_tokens"] == 20 * 4 * 32 for line in lines)
        dist.destroy_process_group()

    return run


def losses(output: Path) -> dict[int, float]:
    entries = list(map(json.loads, (output / "log.jsonl").read_text().splitlines()))
    found = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    assert [step for step, _ in found] == list(range(1, 21))
    return dict(found)


def check_same(output: Path, alone: Path, tolerance: float = 1e-4) -> None:
    assert losses(output) == pytest.approx(losses(alone), abs=tolerance)
    expected, found = load_file(alone / "model.safetensors"), load_file(output / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=0)
    exits = [json.loads((each / "training.json").read_text())["exits"] for each in (output, alone)]
    assert [exit_["exit_layer"] for exit_ in exits[0]] == [1, 2, 3, 4]
    for first, second in zip(*exits, strict=True):  # two processes leave out what doesn't fill a batch of both
        assert first["loss"] == pytest.approx(second["loss"], abs=0.05)
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-10", "checkpoint-20"]
    assert {path.name for path in output.iterdir()} == {path.name for path in alone.iterdir()}


@pytest.mark.slow
def test_torchrun(flags: list[str], alone: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    place = ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "-m", "layerskip"]
    process = subprocess.Popen(
        [*torchrun, *place, "train", *flags, "--batch-size", "2", "--output", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    (line,) = out.splitlines()
    assert json.loads(line)["num_tokens"] == 20 * 4 * 32
    check_same(tmp_path / "run", alone)


def test_data_parallel(flags: list[str], alone: Path, tmp_path: Path) -> None:
    in_two_processes(train(flags, tmp_path / "run"))
    check_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_sharded(flags: list[str], alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also goes on from a checkpoint, and from the last one, where nothing is left to do."""
    output, save = tmp_path / "run", run_module.save_final

    def checked(trainer: LayerSkipTrainer, *args: Any, **kwargs: Any) -> None:
        weights = list(trainer.model.parameters())
        assert sum(weight.to_local().numel() for weight in weights) < 0.6 * sum(weight.numel() for weight in weights)
        save(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_final", checked)
        in_two_processes(train(flags, output, "--fsdp"))
    check_same(output, alone)
    whole = (output / "model.safetensors").read_bytes()
    for again in ("checkpoint-10", "checkpoint-20"):
        if again == "checkpoint-10":
            shutil.rmtree(output / "checkpoint-20")
        (output / "model.safetensors").unlink()
        in_two_processes(train(flags, output, "--fsdp", "--resume"))
        assert (output / "model.safetensors").read_bytes() == whole
        check_same(output, alone)


def test_mistakes_end_both_processes(flags: list[str], tmp_path: Path) -> None:
    report = tmp_path / "report"

    def run(rank: int) -> None:
        code = main(["train", *flags, "--batch-size", "2", "--rotation", "9", "--output", str(tmp_path / "run")])
        (report.with_suffix(f".{rank}")).write_text(str(code))

    in_two_processes(run)
    assert [report.with_suffix(f".{rank}").read_text() for rank in range(2)] == ["2", "2"]


SHAPE: dict[str, int] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 300,
}


def make_recipe(model_seed: int = 0) -> tuple[Any, LayerSkipRecipe]:
    torch.manual_seed(model_seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).train()
    config = LayerSkipConfig(dropout_max=0.9, dropout_schedule="constant", rotation=2)
    return model, LayerSkipRecipe(model, config, seed=5)


def draws_of(
    model: Any, recipe: LayerSkipRecipe, batches: list[torch.Tensor], rank: int = 0, world_size: int = 1
) -> list[list[list[bool]]]:
    """Train on some batches of some steps: which layers [L] each sample [B] goes through."""
    entered = [0] * SHAPE["num_hidden_layers"]
    for i, layer in enumerate(recipe.model.model.layers):

        def count(module: nn.Module, args: Any, i: int = i) -> None:
            entered[i] += 1

        layer.register_forward_pre_hook(count)
    draw, found = recipe._draw, []

    def watched(batch_size: int, device: torch.device) -> Any:
        kept = draw(batch_size, device)
        rows = [set(range(batch_size)) if layer is None else set(layer.tolist()) for layer in kept]
        found.append([[sample in layer for layer in rows] for sample in range(batch_size)])
        return kept

    recipe._draw = watched  # type: ignore[method-assign]
    for step, ids in enumerate(batches):
        recipe.begin_step(step, len(batches), rank=rank, world_size=world_size)
        model(input_ids=ids, labels=ids).loss.backward()
        missing = [name for name, weight in model.named_parameters() if weight.grad is None]
        assert missing == [], "processes would wait for each other's gradients forever"
        model.zero_grad()
    assert entered == [len(batches)] * len(entered), "a layer that is sharded has to be entered by all processes"
    return found


def test_all_processes_enter_all_layers_and_draw_as_one(tmp_path: Path) -> None:
    """Even where all samples of one process skip a layer; together they skip what one process would."""
    batches = [torch.randint(300, (4, 8), generator=torch.Generator().manual_seed(step)) for step in range(12)]
    file = tmp_path / "draws.json"

    def run(rank: int) -> None:
        dist.init_process_group("gloo")
        own = [batch[2 * rank : 2 * rank + 2] for batch in batches]
        found = draws_of(*make_recipe(), own, rank, 2)
        gathered: list[Any] = [None, None]
        dist.all_gather_object(gathered, found)
        if rank == 0:
            file.write_text(json.dumps(gathered))
        dist.barrier()
        dist.destroy_process_group()

    in_two_processes(run)
    first, second = json.loads(file.read_text())
    expected = draws_of(*make_recipe(), batches)
    assert [one + other for one, other in zip(first, second, strict=True)] == expected
    skipped_by_all_of_one = [step for step in first if any(not one and not other for one, other in zip(*step))]  # noqa: B905
    assert skipped_by_all_of_one, "the case that matters has to come up"
    assert any(one != other for one, other in zip(first, second, strict=True))
