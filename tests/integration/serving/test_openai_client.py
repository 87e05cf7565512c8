"""The official client, unchanged: answers equal those of the library."""

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from openai import OpenAI
from servers import Served, events

from layerskip import LanguageModel

PROMPTS = ["def add(a, b):", "import os\n", "class Stack:\n    def push", "for i in range(10):\n"]


@pytest.fixture(scope="module")
def client(demo: Served) -> OpenAI:
    return OpenAI(base_url=f"{demo.address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def greedy(lm: LanguageModel) -> list[str]:
    return [result.text for result in lm.generate(PROMPTS, max_new_tokens=48)]


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "demo"
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    "options",
    [{}, {"generation_strategy": "autoregressive"}, {"exit_layer": 4}, {"exit_layer": 2, "num_speculations": 7}],
)
def test_greedy_texts_are_those_of_the_library(client: OpenAI, greedy: list[str], options: dict[str, object]) -> None:
    answer = client.completions.create(model="demo", prompt=PROMPTS, max_tokens=48, temperature=0, extra_body=options)
    assert [choice.text for choice in answer.choices] == greedy
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 48 * len(PROMPTS)


def test_a_seeded_text_is_that_of_the_library_alone_and_under_load(client: OpenAI, lm: LanguageModel) -> None:
    results = [lm.generate(prompt, max_new_tokens=40, temperature=0.9, top_p=0.95, seed=7)[0] for prompt in PROMPTS]
    expected = [result.text for result in results]

    def ask(prompt: str) -> str:
        answer = client.completions.create(
            model="demo", prompt=prompt, max_tokens=40, temperature=0.9, top_p=0.95, seed=7
        )
        return answer.choices[0].text

    assert [ask(prompt) for prompt in PROMPTS] == expected
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, PROMPTS * 6)) == expected * 6


def test_a_stream_gives_the_same_text(client: OpenAI, greedy: list[str]) -> None:
    stream = client.completions.create(
        model="demo",
        prompt=PROMPTS[0],
        max_tokens=48,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == greedy[0]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 48


def test_usage_comes_in_a_stream_only_if_it_is_asked_for(client: OpenAI) -> None:
    stream = client.completions.create(model="demo", prompt="x", max_tokens=4, stream=True)
    assert all(chunk.choices and chunk.usage is None for chunk in stream)


def test_several_texts_have_seeds_of_their_own(client: OpenAI, lm: LanguageModel) -> None:
    answer = client.completions.create(model="demo", prompt=PROMPTS[0], max_tokens=24, n=3, seed=11, temperature=1)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    seeds = (11, 12, 13)
    assert texts == [lm.generate(PROMPTS[0], max_new_tokens=24, temperature=1.0, seed=seed)[0].text for seed in seeds]


def test_a_stop_string_ends_the_text(client: OpenAI, greedy: list[str]) -> None:
    answer = client.completions.create(model="demo", prompt=PROMPTS[0], max_tokens=48, temperature=0, stop=["_n"])
    assert answer.choices[0].text == greedy[0].partition("_n")[0]
    assert answer.choices[0].finish_reason == "stop"


def test_token_ids_are_prompts(client: OpenAI, greedy: list[str], demo: Served) -> None:
    with demo.client() as http:
        tokens = http.post("/tokenize", json={"prompt": PROMPTS[0]}).json()["tokens"]
        assert http.post("/detokenize", json={"tokens": tokens}).json()["prompt"].endswith(PROMPTS[0])
    answer = client.completions.create(model="demo", prompt=tokens, max_tokens=48, temperature=0)
    assert answer.choices[0].text == greedy[0]


def test_drafts_are_told_to_those_who_ask(demo: Served) -> None:
    body = {
        "prompt": PROMPTS[0],
        "max_tokens": 48,
        "temperature": 0,
        "exit_layer": 4,
        "num_speculations": 4,
        "stream": True,
    }
    with demo.client() as http:
        answer = http.post("/v1/completions", json={**body, "stream_options": {"include_drafts": True}})
    rounds = [chunk["speculation"] for chunk in events(answer.text.split("\n")) if "speculation" in chunk]
    drafted = [each for each in rounds if each["drafts"]]  # type: ignore[index]
    assert drafted
    for each in drafted:
        accepted = each["num_accepted"]  # type: ignore[index]
        assert each["exit_layer"] == 4  # type: ignore[index]
        assert [t["id"] for t in each["tokens"]][:accepted] == [d["id"] for d in each["drafts"]][:accepted]  # type: ignore[index]
