"""From messages to token ids: which template a λ takes, and whether it opens a think block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mi_runtime.request import Dial
from server.checkpoint import Endpoint
from server.reasoning import THINK_OPEN
from server.schemas import Message
from server.templates import ChatTemplate
from server.vocabulary import Vocabulary

ReasoningTemplate = Literal["auto", "instruct", "thinking"]


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: tuple[int, ...]
    opens_block: bool  # it ends inside `<think>`


class Prompts:
    """The pair's tokenizer and its two templates.

    `auto` is how the paper ran it: at λ above the threshold the Thinking endpoint's template, else
    Instruct's own. The threshold is asked for at each prompt: the profile that has it is known once
    the pair is loaded.
    """

    def __init__(
        self,
        instruct: Endpoint,
        thinking: Endpoint,
        *,
        template: ReasoningTemplate = "auto",
        think_threshold: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.vocabulary = Vocabulary.load(thinking.directory)
        self._instruct = ChatTemplate(instruct)
        self._thinking = ChatTemplate(thinking)
        self._choice = template
        self._think_threshold = think_threshold

    def build_each(self, messages: Sequence[Message], dials: Sequence[Dial]) -> list[Prompt]:
        """One prompt a dial; dials that take the same template share it."""
        built: dict[ChatTemplate, Prompt] = {}
        for dial in dials:
            template = self._template(dial)
            if template not in built:
                built[template] = self.build(messages, dial)
        return [built[self._template(dial)] for dial in dials]

    def build(self, messages: Sequence[Message], dial: Dial) -> Prompt:
        """Raises `InvalidRequest` where the template refuses the messages."""
        text = self._template(dial).render([_template_view(message) for message in messages])
        return Prompt(
            token_ids=tuple(self.vocabulary.encode(text)),
            # The end alone decides: what the user wrote stands before it.
            opens_block=text.rstrip().endswith(THINK_OPEN),
        )

    def _template(self, dial: Dial) -> ChatTemplate:
        if self._choice == "auto":
            thinks = dial.reasoning_lambda > self._think_threshold()
            return self._thinking if thinks else self._instruct
        return self._thinking if self._choice == "thinking" else self._instruct


def _template_view(message: Message) -> dict[str, Any]:
    """A message as templates read it: `developer` is OpenAI's newer word for `system`."""
    view = {
        "role": "system" if message.role == "developer" else message.role,
        "content": message.text,
    }
    if message.name is not None:
        view["name"] = message.name
    reasoning = message.reasoning_content or message.reasoning
    if reasoning is not None:
        view["reasoning_content"] = reasoning
    return view
