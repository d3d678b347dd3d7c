"""Raw prompts, their scores and continued messages work from client to embedded pair."""

from typing import Any

import httpx
import openai
import pytest

from tests.contract.conftest import ServerProcess

QUESTION = "a=6,b=a-2,c=b+6,d=c-3. d?"
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **fields: Any) -> Any:
    value = fields.pop("reasoning_lambda", 1.0)
    extra = {"reasoning_lambda": value} | fields.pop("extra", {})
    fields = {"model": "pair", "temperature": 0, "max_tokens": 200} | fields
    return client.completions.create(prompt=prompt, extra_body=extra, **fields)


def test_a_raw_prompt_is_answered_with_the_text_that_chat_splits(client: openai.OpenAI) -> None:
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


def test_a_fan_out_applies_to_raw_prompts(client: openai.OpenAI) -> None:
    answer = complete(client, reasoning_lambda=[0.0, 1.0])
    assert ["<think>" in choice.text for choice in answer.choices] == [False, True]
    assert [choice.reasoning_lambda for choice in answer.choices] == [0.0, 1.0]


def test_a_prompt_as_text_and_as_token_ids_gets_the_same_answer(
    client: openai.OpenAI, real_server: ServerProcess
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


def test_a_scored_answer_has_the_log_probabilities_of_its_generation(
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
def test_the_request_of_a_loglikelihood_task_finds_the_greedy_answer(
    client: openai.OpenAI, real_server: ServerProcess, tokens: bool
) -> None:
    """The request is that of lm-evaluation-harness: a batch, and one token, which it drops."""
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


def test_every_sampling_field_is_accepted(client: openai.OpenAI) -> None:
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
def test_a_field_that_is_not_implemented_is_a_bad_request(client: openai.OpenAI, name: str) -> None:
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

    full_message = ask().choices[0].message
    head, tail = full_message.reasoning[:20], full_message.reasoning[20:]
    for last in (
        {"role": "assistant", "content": "", "reasoning_content": head},
        {"role": "assistant", "content": f"<think>\n{head}"},
    ):
        rest = ask(last, continue_final_message=True, add_generation_prompt=False)
        assert rest.choices[0].message.reasoning == tail
        assert rest.choices[0].message.content == full_message.content
    last_message = {
        "role": "assistant",
        "content": "Answer: ",
        "reasoning_content": full_message.reasoning,
    }
    rest = ask(last_message, continue_final_message=True).choices[0].message
    assert rest.content == full_message.content.removeprefix("Answer: ")
    assert not hasattr(rest, "reasoning")
