"""Log-probabilities over HTTP are those of the library; with `echo`, those of prompts too."""

import pytest
import torch
from openai import OpenAI
from servers import Served, events

from layerskip import LanguageModel

PROMPT = "def add(a, b):\n    return"
ASK = {"model": "demo", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "logprobs": 3}


@pytest.fixture(scope="module")
def client(demo: Served) -> OpenAI:
    return OpenAI(base_url=f"{demo.address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected(lm: LanguageModel) -> torch.Tensor:
    """Log-probabilities after each token of the prompt and its greedy continuation."""
    (tokens,) = lm.encode(PROMPT)
    (result,) = lm.generate(PROMPT, max_new_tokens=20)
    return lm.logits([*tokens, *result.token_ids]).log_softmax(-1)


@pytest.mark.parametrize(
    "options", [{}, {"generation_strategy": "autoregressive"}, {"exit_layer": 4, "num_speculations": 6}]
)
def test_generated_tokens(
    client: OpenAI, lm: LanguageModel, expected: torch.Tensor, options: dict[str, object]
) -> None:
    choice = client.completions.create(**ASK, extra_body=options).choices[0]  # type: ignore[call-overload]
    start = len(lm.encode(PROMPT)[0])
    (result,) = lm.generate(PROMPT, max_new_tokens=20)
    values = [expected[start - 1 + i, token].item() for i, token in enumerate(result.token_ids)]
    assert choice.logprobs.token_logprobs == pytest.approx(values, abs=1e-4)
    assert "".join(choice.logprobs.tokens) == choice.text
    for i, top in enumerate(choice.logprobs.top_logprobs):
        assert sorted(top.values())[-3:] == pytest.approx(
            sorted(expected[start - 1 + i].topk(3).values.tolist()), abs=1e-4
        )
    offsets = choice.logprobs.text_offset
    assert [
        choice.text[offset:][: len(token)] for offset, token in zip(offsets, choice.logprobs.tokens, strict=True)
    ] == choice.logprobs.tokens


@pytest.mark.parametrize("max_tokens", [0, 1, 20])
def test_prompts_with_echo(client: OpenAI, lm: LanguageModel, expected: torch.Tensor, max_tokens: int) -> None:
    (tokens,) = lm.encode(PROMPT)
    for _ in range(2):  # the second time the prompt is in the cache of prefixes
        choice = client.completions.create(**{**ASK, "max_tokens": max_tokens}, echo=True).choices[0]  # type: ignore[call-overload]
        values = [expected[i, token].item() for i, token in enumerate(tokens[1:])]
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1 : len(tokens)] == pytest.approx(values, abs=1e-4)
        assert len(choice.logprobs.tokens) == len(tokens) + max_tokens
        assert choice.text.startswith(PROMPT)
        assert (choice.text == PROMPT) == (max_tokens == 0)


def test_a_stream_has_the_same(client: OpenAI, demo: Served) -> None:
    whole = client.completions.create(**ASK, echo=True).choices[0]  # type: ignore[call-overload]
    with demo.client() as http:
        answer = http.post("/v1/completions", json={**ASK, "echo": True, "stream": True})
    choices = [chunk["choices"][0] for chunk in events(answer.text.split("\n"))]  # type: ignore[index]
    assert "".join(choice["text"] for choice in choices) == whole.text
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [each for part in parts for each in part[name]] == getattr(whole.logprobs, name)


def test_penalties_and_biases(client: OpenAI, lm: LanguageModel) -> None:
    for options in ({"frequency_penalty": 1.5}, {"presence_penalty": 1.0}, {"logit_bias": {269: -100, 30: 5}}):
        answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=30, temperature=0, **options)  # type: ignore[arg-type]
        assert answer.choices[0].text == lm.generate(PROMPT, max_new_tokens=30, **options)[0].text  # type: ignore[arg-type]
        assert answer.choices[0].text != lm.generate(PROMPT, max_new_tokens=30)[0].text
