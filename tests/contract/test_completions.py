"""Raw prompts, their scores and continued messages, with the real client and the real server."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

QUESTION = "a=6,b=a-2,c=b+6,d=c-3. d?"
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
EXAMPLES = re.findall(r"```bash\n(curl .*?)```", PAGE, re.DOTALL)


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **fields: Any) -> Any:
    value = fields.pop("reasoning_lambda", 1.0)
    extra = {"reasoning_lambda": value} | fields.pop("extra", {})
    fields = {"model": "pair", "temperature": 0, "max_tokens": 200} | fields
    return client.completions.create(prompt=prompt, extra_body=extra, **fields)


def test_a_raw_prompt_gets_the_text_that_chat_splits(client: openai.OpenAI) -> None:
    raw = complete(client).choices[0]
    chat = client.chat.completions.create(
        model="pair",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        extra_body={"reasoning_lambda": 1.0},
    )
    message = chat.choices[0].message
    assert raw.text == f"<think>\n{message.reasoning}\n</think>\n\n{message.content}"  # type: ignore[attr-defined]
    assert raw.finish_reason == "stop"


def test_the_dial_applies_to_raw_prompts(client: openai.OpenAI) -> None:
    answer = complete(client, reasoning_lambda=[0.0, 1.0])
    assert ["<think>" in choice.text for choice in answer.choices] == [False, True]
    assert [choice.reasoning_lambda for choice in answer.choices] == [0.0, 1.0]


def test_texts_and_token_ids_of_one_prompt_are_one_prompt(
    client: openai.OpenAI, real_server: Any
) -> None:
    body = {"messages": [{"role": "user", "content": QUESTION}], "reasoning_lambda": 1}
    ids = httpx.post(f"{real_server.url}/tokenize", json=body).json()["tokens"]
    answers = [complete(client, form) for form in (PROMPT, [PROMPT], ids, [ids, ids])]
    assert {choice.text for answer in answers for choice in answer.choices} == {
        answers[0].choices[0].text
    }
    assert [answer.usage.prompt_tokens // len(ids) for answer in answers] == [1, 1, 1, 2]
    text = httpx.post(f"{real_server.url}/detokenize", json={"tokens": ids}).json()
    assert text == {"prompt": PROMPT}


def test_a_scored_answer_has_the_log_probabilities_it_was_given_with(
    client: openai.OpenAI,
) -> None:
    answer = complete(client, logprobs=2, max_tokens=12).choices[0]
    scored = complete(client, PROMPT + answer.text, echo=True, logprobs=2, max_tokens=0).choices[0]
    assert scored.text == PROMPT + answer.text
    count = len(answer.logprobs.tokens)
    assert scored.logprobs.tokens[-count:] == answer.logprobs.tokens
    for ours, given in zip(
        scored.logprobs.token_logprobs[-count:], answer.logprobs.token_logprobs, strict=True
    ):
        assert ours == pytest.approx(given, abs=1e-3)
    assert scored.logprobs.token_logprobs[0] is None
    assert [offset + len(PROMPT) for offset in answer.logprobs.text_offset] == (
        scored.logprobs.text_offset[-count:]
    )


@pytest.mark.parametrize("tokens", [False, True], ids=["text", "token ids"])
def test_the_request_of_a_loglikelihood_task_tells_which_answer_is_greedy(
    client: openai.OpenAI, real_server: Any, tokens: bool
) -> None:
    """As lm-evaluation-harness sends it: a batch, one token, which it drops."""
    url = f"{real_server.url}/tokenize"
    prompts: list[Any] = [f"{PROMPT}Answer: {digit}" for digit in range(10)]
    ids = [httpx.post(url, json={"prompt": one}).json()["tokens"] for one in prompts]
    context = len(ids[0]) - 1
    answer = complete(
        client,
        ids if tokens else prompts,
        echo=True,
        logprobs=1,
        max_tokens=1,
        seed=1234,
        reasoning_lambda=0.0,
    )
    greedy = []
    for choice in answer.choices:
        (logprob,) = choice.logprobs.token_logprobs[context:-1]
        (top,) = choice.logprobs.top_logprobs[context:-1]
        greedy.append(logprob == max(top.values()))
    direct = complete(client, f"{PROMPT}Answer: ", max_tokens=1, reasoning_lambda=0.0)
    assert [digit for digit in range(10) if greedy[digit]] == [int(direct.choices[0].text)]


def test_a_stream_adds_up_to_the_plain_text(client: openai.OpenAI) -> None:
    plain = complete(client, echo=True, n=2, seed=1, temperature=1.0)
    options = {"include_usage": True}
    stream = complete(
        client, echo=True, n=2, seed=1, temperature=1.0, stream=True, stream_options=options
    )
    chunks = list(stream)
    for choice in plain.choices:
        pieces = [one.text for it in chunks for one in it.choices if one.index == choice.index]
        assert "".join(pieces) == choice.text
    assert chunks[-1].usage == plain.usage


def test_every_sampling_field_is_taken(client: openai.OpenAI) -> None:
    extra = {
        "top_k": 5,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "min_tokens": 1,
        "ignore_eos": True,
        "stop_token_ids": [5],
        "priority": 3,
        "cache_salt": "s",
        "metadata": {"a": "b"},
        "add_special_tokens": False,
    }
    answer = complete(
        client,
        temperature=0.5,
        top_p=0.9,
        frequency_penalty=0.1,
        presence_penalty=0.1,
        logit_bias={"7": -100},
        stop=["zzz"],
        user="u",
        best_of=1,
        max_tokens=4,
        extra=extra,
    )
    assert answer.usage.completion_tokens <= 4


@pytest.mark.parametrize("name", ["suffix", "best_of"])
def test_what_is_not_implemented_is_a_bad_request(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **{name: 3 if name == "best_of" else "x"})
    assert caught.value.param == name


def test_a_final_message_is_continued_to_the_same_answer(client: openai.OpenAI) -> None:
    question = {"role": "user", "content": QUESTION}

    def ask(*messages: dict[str, Any], **extra: Any) -> Any:
        return client.chat.completions.create(
            model="pair",
            messages=[question, *messages],  # type: ignore[list-item]
            temperature=0,
            extra_body={"reasoning_lambda": 1.0} | extra,
        )

    whole = ask().choices[0].message
    head, tail = whole.reasoning[:20], whole.reasoning[20:]
    for last in (
        {"role": "assistant", "content": "", "reasoning_content": head},
        {"role": "assistant", "content": f"<think>\n{head}"},
    ):
        rest = ask(last, continue_final_message=True, add_generation_prompt=False)
        assert rest.choices[0].message.reasoning == tail
        assert rest.choices[0].message.content == whole.content
    said = {"role": "assistant", "content": "Answer: ", "reasoning_content": whole.reasoning}
    rest = ask(said, continue_final_message=True).choices[0].message
    assert rest.content == whole.content.removeprefix("Answer: ")
    assert not hasattr(rest, "reasoning")


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_of_the_reference_works(real_server: Any, example: str) -> None:
    command = example.replace("http://127.0.0.1:8000", real_server.url)
    command = command.replace('"mi-embedded"', '"pair"')
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert all(choice["finish_reason"] for choice in answer["choices"])
