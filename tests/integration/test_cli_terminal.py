"""The program on a real (pseudo) terminal: colours, drafts, tables, prompts, history, Ctrl-C."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

TIMEOUT = 90.0
GREEN, YELLOW, DIM = "\x1b[32m", "\x1b[1;33m", "\x1b[2m"
TEMPLATE = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}# assistant: "


class Program:
    """A program on a terminal of 80 columns."""

    def __init__(self, *argv: str, env: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "layerskip", *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            start_new_session=True,
        )
        os.close(slave)
        self.output = ""
        self._place = 0

    def wait_for(self, text: str) -> str:
        """Read until a text comes, after what was waited for before; all from there up to it."""
        start, deadline = self._place, time.monotonic() + TIMEOUT
        while (found := self.output.find(text, start)) < 0:
            assert time.monotonic() < deadline, f"no {text!r} in {self.output[start:]!r}"
            assert self._read(), f"ended without {text!r}: {self.output[start:]!r}"
        self._place = found + len(text)
        return self.output[start : self._place]

    def send(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def interrupt(self, text: str) -> str:
        """Press Ctrl-C until a text comes; all up to it.

        At the prompt, readline notices a signal only while it waits for keys: one that comes while it draws those typed
        just before waits for the next key.
        """
        start = self._place
        for _ in range(10):
            self.send("\x03")
            deadline = time.monotonic() + 3
            while self.output.find(text, start) < 0 and time.monotonic() < deadline:
                if select.select([self._master], [], [], 0.1)[0]:
                    assert self._read(), f"ended without {text!r}: {self.output[start:]!r}"
            if self.output.find(text, start) >= 0:
                break
        return self.wait_for(text)

    def end(self) -> int:
        """Read to the end; the exit code."""
        while self._read():
            pass
        return self._process.wait(TIMEOUT)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._master)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._master], [], [], TIMEOUT)
        assert ready, f"nothing more after {self.output!r}"
        try:
            content = os.read(self._master, 65536)
        except OSError:  # Linux: nobody has the other side any more
            return False
        self.output += content.decode("utf-8", "replace")
        return bool(content)


class Terminal:
    def __init__(self, home: Path) -> None:
        keep = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
        self.env = {**keep, "TERM": "xterm-256color", "XDG_STATE_HOME": str(home), "OMP_NUM_THREADS": "1"}
        self.programs: list[Program] = []

    def start(self, *argv: str, **env: str) -> Program:
        self.programs.append(Program(*argv, env=self.env | env))
        return self.programs[-1]


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    started = Terminal(tmp_path / "state")
    yield started
    for program in started.programs:
        program.close()


DRAFT = ("--generation-strategy", "self_speculative", "--exit-layer", "4")
"""Always drafts; whether adaptive decoding does depends on what else the machine is doing."""
GENERATE = ("generate", "--prompt", "def fibonacci(n):", *DRAFT, "--max-new-tokens", "40")


def test_generate_colours_and_compares(terminal: Terminal) -> None:
    program = terminal.start(*GENERATE)
    assert program.end() == 0
    assert GREEN in program.output
    assert YELLOW in program.output
    assert re.search(r"\x1b\[\d+D\x1b\[0?K", program.output), "no drafts were taken back"
    for word in ("colours:", "autoregressive", "tokens/s", "speed", "layer calls", "drafts accepted", "tokens a round"):
        assert word in program.output
    assert re.search(r"same text\s+│\s+yes", program.output)
    assert "Traceback" not in program.output


@pytest.mark.parametrize(("flags", "env"), [((), {"NO_COLOR": "1"}), (("--no-color",), {})])
def test_no_colours_when_they_are_not_wanted(terminal: Terminal, flags: tuple[str, ...], env: dict[str, str]) -> None:
    program = terminal.start(*GENERATE, "--no-compare", *flags, **env)
    assert program.end() == 0
    assert not re.search(r"\x1b\[(\d+;)*(3[0-8]|9[0-7])[;m]", program.output.split("colours:")[1])
    assert "autoregressive" not in program.output


@pytest.mark.parametrize("flags", [("--json",), ()])
def test_json_and_dumb_terminals_get_no_control_codes(terminal: Terminal, flags: tuple[str, ...]) -> None:
    program = terminal.start(*GENERATE, *flags, TERM="dumb" if not flags else "xterm")
    assert program.end() == 0
    assert "\x1b" not in program.output


def test_ctrl_c_ends_a_single_generation(terminal: Terminal) -> None:
    program = terminal.start(*GENERATE[:-1], "900", "--ignore-eos")
    program.wait_for(GREEN + "accepted")
    program.wait_for("\x1b[0K")
    program.send("\x03")
    assert program.end() == 130
    assert "Traceback" not in program.output
    assert "autoregressive" not in program.output


def test_prompts_are_asked_for_and_remembered(terminal: Terminal, tmp_path: Path) -> None:
    program = terminal.start("generate", *DRAFT, "--max-new-tokens", "900", "--ignore-eos", "--no-compare")
    program.wait_for("> ")
    program.send("class Stack:\r")
    program.wait_for("\x1b[0K")
    program.send("\x03")  # ends this text only
    program.wait_for("tokens/s")
    program.wait_for("> ")
    program.send("/usr/bin\r")  # a prompt like any other
    program.wait_for("\x1b[0K")
    program.send("\x03")
    program.wait_for("tokens/s")
    program.wait_for("> ")
    program.send("/help\r")
    program.wait_for("Ctrl-C stops the text")
    program.wait_for("> ")
    program.send("typed but given up")
    program.wait_for("given up")
    program.interrupt("Ctrl-D ends)")
    program.wait_for("> ")
    program.send("\x04")
    assert program.end() == 0
    assert "Traceback" not in program.output
    assert (tmp_path / "state/layerskip/generate_history").read_text().splitlines()[-2:] == ["/usr/bin", "/help"]


def test_history_that_cannot_be_written_is_no_error(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    program = terminal.start("generate", XDG_STATE_HOME=str(tmp_path / "file"))
    program.wait_for("> ")
    program.send("/quit\r")
    assert program.end() == 0
    assert "Traceback" not in program.output


def test_chat(terminal: Terminal, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    program = terminal.start(
        "chat", "--model", "demo", "--chat-template", str(template), "--max-context", "300", "--ignore-eos", *DRAFT
    )
    program.wait_for("> ")
    program.send("hello\r")
    program.wait_for("tokens/s")
    program.wait_for("> ")
    program.send("/stats\r")
    program.wait_for("0 of")
    program.wait_for("> ")
    for _ in range(2):  # the second answer finds no room for all of it
        program.send("again\r")
        program.wait_for("tokens/s")
        program.wait_for("> ")
    program.send("and again\r")
    assert "the context is full" in program.wait_for("> ")
    program.send(" /reset \r")
    program.wait_for("forgotten")
    program.wait_for("> ")
    for message in ("/etc/passwd", "//reset", "/what"):  # messages, whatever they begin with
        program.send(f"{message}\r")
        program.wait_for("tokens/s")
        program.wait_for("> ")
        program.send("/reset\r")
        program.wait_for("forgotten")
        program.wait_for("> ")
    program.send("hello\r")
    program.wait_for("\x1b[0K")
    program.send("\x03")
    assert "tokens/s" in program.wait_for("> ")
    program.send("\x04")
    assert program.end() == 0
    assert "Traceback" not in program.output
