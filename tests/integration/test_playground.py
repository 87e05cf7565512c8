"""The playground in a real browser, against a server whose streams are written here."""

import json
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from browser import BROWSER, Browser, browse
from scripted_server import Answer, Script, Served, serve

from layerskip.serving.playground import playground_files

FOLDER = Path(__file__).parents[2] / "src" / "layerskip" / "serving" / "playground"
ABOUT = {"num_layers": 8, "adapted_exits": [2, 4], "max_model_len": 2048, "chat": True}
MODELS = Script(content={"object": "list", "data": [{"id": "tiny/model", "object": "model", "layerskip": ABOUT}]})
FORBIDDEN = r"https?://|@import|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\("
EVIL = "<img src=x onerror=alert(1)>"

needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium")


def chunk(path: str, text: str, speculation: dict[str, Any] | None = None, reason: str | None = None) -> dict[str, Any]:
    said = {"delta": {"content": text} if text else {}} if "chat" in path else {"text": text}
    made: dict[str, Any] = {"choices": [{"index": 0, **said, "finish_reason": reason}]}
    return made if speculation is None else {**made, "speculation": speculation}


def round_of(drafter: str | None, drafts: list[str], tokens: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "index": 0,
        "drafter": drafter,
        "exit_layer": 2 if drafter in ("early_exit", "exit_adapter") else 0,
        "drafts": [{"id": 1, "text": text} for text in drafts],
        "num_accepted": sum(source == "accepted" for _, source in tokens),
        "tokens": [{"id": 1, "text": text, "source": source} for text, source in tokens],
        "seconds": 0.01,
    }


ROUNDS = [
    round_of(None, [], [(" Once", "decoded")]),
    round_of(
        "exit_adapter", [" upon", " a", " hill"], [(" upon", "accepted"), (" a", "accepted"), (" time", "corrected")]
    ),
    round_of("ngram", [" there", " was"], [(" there", "accepted"), (" was", "accepted"), (" ä", "bonus")]),
    # A character of two tokens, which comes with the second.
    round_of("early_exit", ["\ufffd", " x"], [("\ufffd", "accepted"), ("\ufffd", "corrected")]),
    round_of(None, [], [(EVIL, "decoded")]),
]
TEXTS = [" Once", " upon a time", " there was ä", "🙂", EVIL]
TEXT = "".join(TEXTS)


def story(path: str, body: dict[str, Any], delay: float = 0.0, *, timed: bool = True) -> Script:
    """The story with speculation; without it, one token in each chunk. The server takes 20 ms for each chunk."""
    if body.get("generation_strategy") == "autoregressive":
        pieces = [token["text"] for each in ROUNDS[:3] for token in each["tokens"]] + ["🙂", EVIL]
        chunks = [chunk(path, text, round_of(None, [], [(text, "decoded")])) for text in pieces]
    else:
        chunks = [chunk(path, text, told) for text, told in zip(TEXTS, ROUNDS, strict=True)]
    usage = {"prompt_tokens": 3, "completion_tokens": 10}
    metrics: dict[str, Any] = {"speculative_decoding": {}, "cached_tokens": 2}
    if timed:
        metrics |= {"time_to_first_token_seconds": 0.1, "seconds": 0.1 + 0.02 * (len(chunks) - 1)}
    last = {"choices": [], "usage": usage, "metrics": metrics}
    return Script(chunks=(*chunks, chunk(path, "", reason="stop"), last, "data: [DONE]\n\n"), delay=delay)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browse(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def page(browser: Browser) -> Iterator[Browser]:
    """A page whose console stays silent and that scrolls to no side, if nothing is said of it."""
    browser.messages.clear()
    browser.look(1280)
    yield browser
    assert browser.messages == []


def visit(page: Browser, server: Served, **query: Any) -> None:
    """Open the page; with `run`, until the text is there."""
    page.open(f"{server.url}/" + (f"?{urlencode(query)}" if query else ""))
    states = ("done", "failed") if query.get("run") else ("ready",)
    page.wait(f"{list(states)}.includes(document.body.dataset.state)")


def texts(page: Browser, selector: str) -> list[str]:
    found = page.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")
    return list(found)


def playground(answer: Answer = lambda path, body, _: story(path, body), models: Script = MODELS) -> Any:
    return serve(answer, models=models, folder=FOLDER)


@needs_browser
def test_a_generation_in_colours(page: Browser) -> None:
    with playground() as server:
        visit(page, server, mode="completion", prompt="A tale:", run=1, temperature=0.5, seed=7)
        assert texts(page, ".text .accepted") == [" upon", " a", " there", " was", "🙂"]
        assert texts(page, ".text .corrected") == [" time"]
        assert texts(page, ".text .bonus") == [" ä"]
        assert texts(page, ".text .taken") == [" hill", " x"]
        assert texts(page, ".text .given") == ["A tale:"]
        # What was taken back is before what came in its place.
        assert texts(page, ".answer .text") == [f"A tale: Once upon a hill time there was ä x🙂{EVIL}"]
        shown = page.run("document.querySelector('.answer .text').innerText")
        assert shown == f"A tale:{TEXT}"  # taken-back drafts aren't shown
        assert page.run("document.querySelectorAll('.text img').length") == 0
        assert texts(page, "#spoken") == [TEXT]
        assert texts(page, "#tokens, #per-round, #cached") == ["2.00", "10", "2"]
        assert texts(page, "#accepted") == ["71.4%"]  # 5 of 7
        assert texts(page, "#speed, #first") == ["113", "100 ms"]
        assert texts(page, ".position > div:nth-child(2)") == ["100", "67", "0"]
        # 10 tokens; layers 1 and 2 drafted twice (4 and 3 passes), and ran once in three other rounds.
        assert texts(page, ".layer .passes") == ["1.00"] * 2 + ["0.50"] * 6
        assert texts(page, ".layer.adapted .number") == ["2", "4"]
    ((path, body, _),) = server.requests
    assert path == "/v1/completions"
    assert body["stream_options"] == {"include_usage": True, "include_drafts": True}
    assert (body["prompt"], body["temperature"], body["seed"], body["max_tokens"]) == ("A tale:", 0.5, 7, 200)
    assert (body["model"], body["generation_strategy"], "exit_layer" in body) == ("tiny/model", "adaptive", False)


@needs_browser
def test_colours_and_taken_back_drafts_can_be_switched(page: Browser) -> None:
    with playground() as server:
        visit(page, server, prompt="x", mode="completion", run=1)
        colour = "getComputedStyle(document.querySelector('.text .accepted')).backgroundColor"
        taken = "getComputedStyle(document.querySelector('.text .taken')).display"
        assert (page.run(colour) != "rgba(0, 0, 0, 0)", page.run(taken)) == (True, "none")
        page.run("document.getElementById('keep').click()")
        page.run("document.getElementById('colours').click()")
        assert (page.run(colour), page.run(taken)) == ("rgba(0, 0, 0, 0)", "inline")


@needs_browser
def test_side_by_side(page: Browser) -> None:
    with playground() as server:
        options = {"strategy": "self_speculative", "exit_layer": 2, "num_speculations": 3, "temperature": 1}
        visit(page, server, prompt="x", mode="completion", run=1, compare=1, **options)
        (verdict,) = texts(page, ".verdict")
        assert verdict.startswith("2.00×")  # 9 tokens in 4 chunks after the first, against 8 chunks
        assert "The same text." in verdict
        assert texts(page, ".pair .who b") == ["self-speculative", "autoregressive"]
        assert texts(page, ".pair .who span") == ["10 tokens, 113 tokens/s", "10 tokens, 56.3 tokens/s"]
        assert texts(page, ".layer .passes")[0] == "1.00"  # the figures are those with drafts
    first, second = (body for _, body, _ in server.requests)
    assert (first["exit_layer"], first["num_speculations"]) == (2, 3)
    assert second["generation_strategy"] == "autoregressive"
    assert "exit_layer" not in second
    assert "num_speculations" not in second
    assert first["seed"] == second["seed"]  # the same random numbers


@needs_browser
def test_without_the_servers_clock_the_page_has_its_own(page: Browser) -> None:
    with playground(lambda path, body, _: story(path, body, delay=0.1, timed=False)) as server:
        visit(page, server, prompt="x", mode="completion", run=1)
        assert 5 < float(texts(page, "#speed")[0]) < 24  # 9 tokens in 400 ms, or somewhat more


@needs_browser
def test_texts_that_differ_are_told(page: Browser) -> None:
    def answer(path: str, body: dict[str, Any], number: int) -> Script:
        end = chunk(path, "", reason="stop")
        return Script(chunks=(chunk(path, "The sa"), chunk(path, "me" if number else "d"), end, "data: [DONE]\n\n"))

    with playground(answer) as server:
        visit(page, server, prompt="x", mode="completion", run=1, compare=1)
        assert "differ from character 7 on" in texts(page, ".verdict")[0]


@needs_browser
def test_a_conversation_by_keyboard(page: Browser) -> None:
    with playground() as server:
        visit(page, server, system="Be brief.")
        assert page.run("document.activeElement.id") == "prompt"
        page.type("Hello,")
        page.press("Enter", shift=True)
        page.type("model")
        assert page.run("document.getElementById('prompt').value") == "Hello,\nmodel"
        page.press("Enter")
        page.wait("document.body.dataset.state === 'done'")
        page.type("And then?")
        page.press("Enter")
        page.wait("document.querySelectorAll('.turn').length === 4 && document.body.dataset.state === 'done'")
    (path, first, _), (_, second, _) = server.requests
    asked = {"role": "user", "content": "Hello,\nmodel"}
    system = {"role": "system", "content": "Be brief."}
    assert path == "/v1/chat/completions"
    assert first["messages"] == [system, asked]
    answered = {"role": "assistant", "content": TEXT}
    assert second["messages"] == [system, asked, answered, {"role": "user", "content": "And then?"}]


@needs_browser
@pytest.mark.parametrize("way", ["key", "button"])
def test_stopping_keeps_what_was_written(way: str, page: Browser) -> None:
    with playground(lambda path, body, _: story(path, body, delay=0.3)) as server:
        visit(page, server, mode="completion")
        page.type("A tale:")
        page.press("Enter")
        page.wait("document.querySelectorAll('.text .corrected').length === 1")
        assert texts(page, "#status") == ["Writing …"]
        assert page.run("document.querySelectorAll('.layer.draft, .layer.verify').length >= 0")
        page.press("Escape") if way == "key" else page.run("document.getElementById('stop').click()")
        page.wait("document.body.dataset.state === 'done'")
        assert texts(page, "#status")[0].startswith("Stopped: 4 tokens")
        assert page.run("document.querySelector('.answer .text').innerText") == "A tale: Once upon a time"
        assert page.run("document.querySelectorAll('.caret').length") == 0


@needs_browser
@pytest.mark.parametrize(
    ("script", "told"),
    [
        (
            Script(
                status=400, content={"error": {"message": f"exit_layer must be below 8 {EVIL}", "param": "exit_layer"}}
            ),
            f"exit_layer must be below 8 {EVIL}",
        ),
        (
            Script(status=503, headers={"Retry-After": "3"}, content={"error": {"message": "the queue is full."}}),
            "the queue is full. Try again in 3 s.",
        ),
        (Script(status=500, content={"hello": 1}), "HTTP 500"),
        (Script(chunks=(chunk("", "Half"), {"error": {"message": "the engine has failed"}})), "the engine has failed"),
        (Script(chunks=(chunk("", "Half"),), cut=True), "The connection to the server was lost"),
        (Script(chunks=(chunk("", "Half"),)), "The connection to the server was lost"),
        (Script(chunks=("data: {\n\n",)), "can’t be read"),
    ],
)
def test_errors_are_told(script: Script, told: str, browser: Browser) -> None:
    browser.messages.clear()
    browser.look(390, 844)
    with playground(lambda *_: script) as server:
        visit(browser, server, prompt="x", mode="completion", run=1)
        (message,) = texts(browser, "#error")
        assert told in message
        seen = """(() => { const error = document.getElementById("error"), box = error.getBoundingClientRect();
            return document.elementFromPoint(box.left + 9, box.bottom - 9) === error; })()"""
        assert browser.run(seen)  # in the window, and nothing covers it
        assert browser.run("document.querySelectorAll('#error img').length") == 0
        assert browser.run("document.getElementById('prompt').value") == "x"
        assert texts(browser, ".answer .text") == (["xHalf"] if "Half" in str(script.chunks) else [])
    # Chromium itself writes failed requests to the console; the page adds nothing.
    assert all("Failed to load resource" in message for message in browser.messages)


@needs_browser
def test_a_lost_server_and_a_wanted_key(browser: Browser) -> None:
    locked = Script(status=401, content={"error": {"message": "a key is needed"}})
    with playground(models=locked) as server:
        browser.open(server.url + "/")
        browser.wait("!document.getElementById('error').hidden")
        assert texts(browser, "#error") == ["a key is needed"]
        assert browser.run("document.activeElement.name") == "key"
    with playground() as server:
        visit(browser, server)
    browser.type("Hello")
    browser.press("Enter")
    browser.wait("document.body.dataset.state === 'failed'")
    assert "connection to the server was lost" in texts(browser, "#error")[0]
    assert browser.run("document.getElementById('prompt').value") == "Hello"  # nothing is lost


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 901, 768, 390, 320])
def test_no_sideways_scrolling(width: int, dark: bool, page: Browser) -> None:
    page.look(width, dark=dark, still=dark)
    word = "unbreakable" * 40

    def answer(path: str, body: dict[str, Any], number: int) -> Script:
        rounds = [round_of("early_exit", [word] * 16, [(word, "accepted"), (word, "corrected")])] * 3
        chunks = [chunk(path, word * 2, each) for each in rounds]
        return Script(chunks=(*chunks, chunk(path, "", reason="stop"), "data: [DONE]\n\n"))

    about = {**ABOUT, "num_layers": 80, "adapted_exits": list(range(2, 80, 3))}
    models = Script(content={"data": [{"id": "a-long-name/" + word, "layerskip": about}]})
    with playground(answer, models) as server:
        for compare in (0, 1):
            visit(page, server, prompt=word, mode="completion", run=1, compare=compare)
            page.run("document.getElementById('keep').click()")
            page.run("document.getElementById('settings-fold').open = true")
            assert page.run("document.documentElement.clientWidth") == width
            for box in ("documentElement", "querySelector('#scroll')", "querySelector('.rail')"):
                assert page.run(f"document.{box}.scrollWidth <= Math.max(1, document.{box}.clientWidth)"), box
        background = page.run("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(20, 23, 26)" if dark else "rgb(253, 253, 251)")


@needs_browser
def test_a_link_carries_prompt_and_settings(page: Browser) -> None:
    with playground() as server:
        visit(page, server, mode="completion", prompt="x & y", strategy="ngram", num_speculations=5, compare=1)
        page.run("navigator.clipboard.writeText = text => { window.copied = text; return Promise.resolve(); }")
        page.run("document.getElementById('link').click()")
        link = page.run("window.copied")
        page.open(link)
        page.wait("document.body.dataset.state === 'ready'")
        assert page.run("document.getElementById('prompt').value") == "x & y"
        assert page.run("document.querySelector('[name=strategy]').value") == "ngram"
        assert page.run("document.querySelector('[name=num_speculations]').value") == "5"
        assert page.run("document.querySelector('[name=exit_layer]').disabled") is True
        assert page.run("document.getElementById('compare').checked") is True
        assert server.requests == []  # only ?run=1 runs


@needs_browser
def test_every_control_has_a_name_and_is_reached_by_tab(page: Browser) -> None:
    with playground() as server:
        visit(page, server)
        nameless = """[...document.querySelectorAll("button, input, select, textarea")].filter(e =>
            !(e.labels?.length && [...e.labels].some(l => l.textContent.trim())) && !e.textContent.trim()
        ).map(e => e.outerHTML)"""
        assert page.run(nameless) == []
        reached = []
        for _ in range(40):
            page.press("Tab")
            reached.append(page.run("document.activeElement.id || document.activeElement.name || ''"))
            outlined = page.run("getComputedStyle(document.activeElement).outlineStyle")
            assert outlined != "none" or reached[-1] in ("", "mode")
        assert {"prompt", "send", "compare", "keep", "strategy", "temperature", "link", "mode"} <= set(reached)


@pytest.fixture(scope="module")
def real() -> Iterator[Served]:
    """The real server, with the embedded model."""
    uvicorn = pytest.importorskip("uvicorn")
    from layerskip import load
    from layerskip.serving.app import create_app
    from layerskip.serving.config import ServerConfig

    app = create_app(load("demo", dtype="float32"), ServerConfig(cache_memory=0.2))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}")
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@needs_browser
@pytest.mark.parametrize("strategy", ["adaptive", "self_speculative", "ngram", "early_exit"])
def test_with_the_real_server(strategy: str, real: Served, page: Browser) -> None:
    exit_layer = {"exit_layer": 4} if strategy in ("self_speculative", "early_exit") else {}
    options = {"max_tokens": 80, "strategy": strategy, "temperature": 0.8, "seed": 3, **exit_layer}
    visit(page, real, prompt="def add(a, b):\n", run=1, compare=1, **options)
    assert page.run("document.getElementById('error').hidden"), texts(page, "#error")
    assert texts(page, "#about") == ["16 layers · context of 1,024 tokens · no chat template, so completions only"]
    (verdict,) = texts(page, ".verdict")
    if strategy != "early_exit":  # coupled sampling: the text doesn't depend on the drafts
        assert "The same text." in verdict
    ours, theirs = texts(page, ".answer .who span")
    assert "tokens/s" in ours
    assert "tokens/s" in theirs
    if strategy == "self_speculative":
        assert page.run("document.querySelectorAll('.text .accepted').length") > 10
        assert texts(page, ".layer .passes")[0] > texts(page, ".layer .passes")[4]
    if strategy == "early_exit":
        assert texts(page, ".layer .passes")[3:5] == ["1.00", "0.00"]


@needs_browser
def test_the_real_server_refuses_in_words(real: Served, browser: Browser) -> None:
    browser.messages.clear()
    visit(browser, real, prompt="x " * 2000, run=1)
    (message,) = texts(browser, "#error")
    assert re.search(r"\d", message), message
    assert browser.run("document.body.dataset.state") == "failed"


class Inline(HTMLParser):
    """Collects what the server's policy refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag
        self.found += [f"{tag} {name}" for name, _ in attrs if name == "style" or name.startswith("on")]
        self.found += [f"{tag} {value}" for _, value in attrs if value and re.match("(https?:)?//", value)]

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style") and data.strip():
            self.found.append(data)


def test_nothing_inline_and_nothing_from_elsewhere() -> None:
    files = playground_files()
    assert {"/", "/playground.css", "/playground.js"} <= set(files)
    parser = Inline()
    parser.feed(files["/"][0].decode())
    assert parser.found == []
    for path, (content, kind) in files.items():
        source = content.decode()
        assert kind.endswith("charset=utf-8")
        if path.endswith((".js", ".css")):
            assert not re.search(
                r"https?://|@import|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", source
            )
            assert len(source.splitlines()) <= 400
            for name in re.findall(r'from "\./([^"]+)"', source):
                assert f"/{name}" in files


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.js")), ids=lambda file: file.name)
def test_scripts_are_modules_that_parse(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / f"{file.stem}.mjs"
    copy.write_bytes(file.read_bytes())
    subprocess.run(["node", "--check", copy], check=True)
