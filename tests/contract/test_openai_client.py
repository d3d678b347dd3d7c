"""An unmodified `openai` client gets its answers, streams and errors from the real server."""

import asyncio
import math
from typing import Any

import openai
import pytest

QUESTION = "a=6,b=a-2,c=b+6,d=c-3. d?"
LAMBDAS = [round(0.03 * index, 2) for index in range(32)]
LONGEST = 24


def ask(client: Any, content: str = QUESTION, **fields: Any) -> Any:
    value = fields.pop("reasoning_lambda", 1.0)
    fields = {"temperature": 0, "model": "pair"} | fields
    return client.chat.completions.create(
        messages=[{"role": "user", "content": content}],
        extra_body={"reasoning_lambda": value},
        **fields,
    )


def test_a_plain_answer_has_reasoning_and_is_correct(client: openai.OpenAI) -> None:
    answer = ask(client)
    (choice,) = answer.choices
    assert choice.message.content == "Answer: 7"
    assert choice.message.reasoning_content.startswith("a=6\nb=a-2=6-2=4\n")
    assert choice.message.reasoning == choice.message.reasoning_content
    assert choice.finish_reason == "stop"
    assert (answer.routing["reasoning_lambda"], answer.routing["source"]) == (1.0, "body")
    details = answer.usage.completion_tokens_details
    assert 0 < details.reasoning_tokens < answer.usage.completion_tokens


def test_lambda_decides_whether_the_model_thinks(client: openai.OpenAI) -> None:
    instruct, thinking = (ask(client, reasoning_lambda=value) for value in (0.0, 1.0))
    assert instruct.choices[0].message.content.startswith("Answer:")
    assert not hasattr(instruct.choices[0].message, "reasoning_content")
    assert instruct.usage.completion_tokens < thinking.usage.completion_tokens


def test_an_alias_of_the_model_sets_lambda(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="pair@0.25", messages=[{"role": "user", "content": QUESTION}], max_tokens=1
    )
    assert answer.model == "pair@0.25"
    assert answer.model_extra is not None
    routing = answer.model_extra["routing"]
    assert (routing["reasoning_lambda"], routing["source"]) == (0.25, "model")


def test_a_stream_adds_up_to_the_plain_answer(client: openai.OpenAI) -> None:
    plain = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == plain.choices[0].message.content
    reasoning = "".join(getattr(delta, "reasoning_content", "") for delta in deltas)
    assert reasoning == plain.choices[0].message.reasoning_content
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_without_include_usage_a_stream_has_none(client: openai.OpenAI) -> None:
    assert all(chunk.usage is None for chunk in ask(client, stream=True, max_tokens=3))


def test_n_choices_differ_and_repeat_with_their_seed(client: openai.OpenAI) -> None:
    def texts() -> list[str]:
        answer = ask(client, n=4, seed=1, temperature=1.5, max_tokens=20, reasoning_lambda=0.5)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        return [
            (choice.message.content or "") + getattr(choice.message, "reasoning", "")
            for choice in answer.choices
        ]

    first = texts()
    assert len(set(first)) > 1
    assert texts() == first


def test_a_stop_string_is_not_shown(client: openai.OpenAI) -> None:
    answer = ask(client, stop=[": "])
    assert answer.choices[0].message.content == "Answer"
    assert answer.choices[0].finish_reason == "stop"


def test_max_tokens_ends_with_length(client: openai.OpenAI) -> None:
    answer = ask(client, max_completion_tokens=5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 5


def test_logprobs_are_sorted_and_the_greedy_token_is_first(client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3, max_tokens=5)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 5
    for entry in entries:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert entry.token == entry.top_logprobs[0].token  # greedy
        assert entry.logprob == pytest.approx(values[0], abs=1e-4)
        assert sum(map(math.exp, values)) <= 1.0 + 1e-4
        assert bytes(entry.bytes).decode() == entry.token


def test_a_bad_request_is_openais_bad_request_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, reasoning_lambda=1.5)
    assert caught.value.param == "reasoning_lambda"
    assert caught.value.code == "invalid_request_error"


def test_a_prompt_that_is_too_long_has_openais_code(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "7" * 3000)
    assert caught.value.code == "context_length_exceeded"


def test_an_unknown_model_is_openais_not_found_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, model="other")
    assert caught.value.code == "model_not_found"


def test_models_can_be_listed_and_retrieved(client: openai.OpenAI) -> None:
    ids = [model.id for model in client.models.list()]
    assert ids[0] == "pair"
    assert client.models.retrieve(ids[1]).id == ids[1]


def test_32_requests_at_32_lambdas_answer_as_each_alone(client: openai.OpenAI) -> None:
    alone = [raw_text(ask_tokens(client, value)) for value in LAMBDAS]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=client.base_url, api_key="none", max_retries=0, timeout=60
        ) as many:
            answers = [ask_tokens(many, value) for value in LAMBDAS]
            return [raw_text(answer) for answer in await asyncio.gather(*answers)]

    assert asyncio.run(together()) == alone
    assert len(set(alone)) > 1


def ask_tokens(client: Any, value: float) -> Any:
    return ask(client, reasoning_lambda=value, max_tokens=LONGEST, logprobs=True)


def raw_text(answer: Any) -> str:
    """Returns the text of every token, tags included."""
    return "".join(entry.token for entry in answer.choices[0].logprobs.content)


def test_greedy_answers_are_those_of_a_checkpoint_merged_offline(client: openai.OpenAI) -> None:
    oracle = Oracle()
    for value in (0.0, 0.3, 0.48, 0.6, 1.0):
        assert raw_text(ask_tokens(client, value)) == oracle.raw_text(value), value


class Oracle:
    """Runs `transformers` on weights merged in fp32."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from mi_runtime.embedded_pair import INSTRUCT_DIRECTORY, THINKING_DIRECTORY

        self.instruct, self.thinking, self.merged = (
            AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
            for directory in (INSTRUCT_DIRECTORY, THINKING_DIRECTORY, INSTRUCT_DIRECTORY)
        )
        self.tokenizer = AutoTokenizer.from_pretrained(THINKING_DIRECTORY)

    def raw_text(self, value: float) -> str:
        ends = zip(self.instruct.parameters(), self.thinking.parameters(), strict=True)
        for merged, (low, high) in zip(self.merged.parameters(), ends, strict=True):
            merged.data = (1 - value) * low.data + value * high.data
        prompt = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        tokens = self.merged.generate(**prompt, max_new_tokens=LONGEST, do_sample=False)
        text: str = self.tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :])
        return text
