r"""The vocabulary and chat template of the embedded pair, and the files that contain them.

There are 320 tokens: 256 bytes, 59 merges that spell a few words, and five added tokens at the end,
named as in Qwen3 (`<think>` and `</think>` are not special, so they survive decoding with special
tokens skipped). Text is split as in Qwen2, so that each digit and each operator of the task is one
token. Nothing is normalized, so any UTF-8 round-trips. The tokenizer is built, not trained: the
merges of a word are its prefixes, from left to right.

The template is Qwen's, with one difference: the generation prompt ends with
`<|im_start|>assistant\n` for both endpoints, so that the model itself decides whether to think.
"""

import json
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from mi_runtime.embedded_pair.task import THINK_CLOSE, THINK_OPEN

PAD: Final = "<|endoftext|>"
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"
VOCABULARY_SIZE: Final = 320
LONGEST_CONTEXT: Final = 2048

WHOLE_WORDS: Final = (
    *("assistant", "system", "user", "Answer", "Wait", "\n\n"),
    *("the", "helpful", "question", "modulo", "chain", "sum", "You", "are", "is", "in", "of", "to"),
)
"""Words that are one token: those that every conversation repeats, then those of the system
messages in the training prompts."""

_ADDED_TOKENS: Final = (
    AddedToken(PAD, special=True, normalized=False),
    AddedToken(TURN_START, special=True, normalized=False),
    AddedToken(TURN_END, special=True, normalized=False),
    AddedToken(THINK_OPEN, special=False, normalized=False),
    AddedToken(THINK_CLOSE, special=False, normalized=False),
)

_QWEN2_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE: Final = """\
{#- Qwen's turns. The generation prompt opens no think block: the model decides whether to think.
    Think blocks of turns before the last user message are stripped. -#}
{%- macro text(content) -%}
    {%- if content is string -%}{{- content -}}
    {%- elif content -%}{%- for part in content -%}{{- part.text -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro without_thinking(content) -%}
    {{- content.split('</think>')[-1].lstrip('\\n') if '</think>' in content else content -}}
{%- endmacro -%}
{%- set turns = namespace(last_user=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set turns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' -}}
    {%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
    {{- '\\n</tools><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set content = text(message.content) -%}
    {%- if message.role in ('system', 'developer') -%}
        {{- '<|im_start|>system\\n' + content + '<|im_end|>\\n' -}}
    {%- elif message.role == 'user' -%}
        {{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if loop.index0 < turns.last_user -%}
            {{- without_thinking(content) -}}
        {%- else -%}
            {%- if message.reasoning_content -%}
                {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' -}}
            {%- endif -%}
            {{- content -}}
        {%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {%- set arguments = function.arguments -%}
            {{- '\\n<tool_call>\\n{"name": "' + function.name + '", "arguments": ' -}}
            {{- arguments if arguments is string else arguments | tojson -}}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif message.role == 'tool' -%}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response>' -}}
        {{- '<|im_end|>\\n' -}}
    {%- else -%}
        {{- raise_exception('unknown role: ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def build_tokenizer() -> Tokenizer:
    """Builds the tokenizer from the constants of this module."""
    vocabulary = {symbol: index for index, symbol in enumerate(_byte_symbols())}
    merges = _merges(WHOLE_WORDS)
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(_ADDED_TOKENS))
    assert tokenizer.get_vocab_size() == VOCABULARY_SIZE
    return tokenizer


def save_tokenizer(directory: Path) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`."""
    build_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    # PreTrainedTokenizerFast uses tokenizer.json unchanged; Qwen2Tokenizer would add its own
    # normalizer (NFC), and text would no longer round-trip.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": LONGEST_CONTEXT,
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def prompt_text(question: str, system: str | None = None) -> str:
    """Renders one question as the template does, up to the assistant's first token.

    The template itself is the reference implementation, but too slow for training, which needs
    thousands of prompts per second.
    """
    head = f"{TURN_START}system\n{system}{TURN_END}\n" if system is not None else ""
    return f"{head}{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n"


def _byte_symbols() -> list[str]:
    """Returns the printable characters that stand for the 256 bytes, in byte order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [
        chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)
    ]


def _merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Returns the merges that spell each word from the left, each once."""
    symbols = _byte_symbols()
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        spelled = [symbols[byte] for byte in word.encode()]
        for end in range(1, len(spelled)):
            merges["".join(spelled[:end]), spelled[end]] = None
    return list(merges)
