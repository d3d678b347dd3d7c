"""Where a sequence stands to its think block, by token ids alone.

Knows the ids of the two tags and nothing of text: the tokens between the tags are the reasoning.
A sequence has at most one think block. The prompt opens it, or the first open tag in the answer
does; after the close tag nothing opens it again.
"""

from enum import Enum, auto

from mi_runtime.request import ThinkTags


class Phase(Enum):
    OUTSIDE = auto()  # no block was opened yet
    INSIDE = auto()
    CLOSED = auto()


class ThinkingState:
    """The think block of one sequence, told each new token in turn."""

    def __init__(self, tags: ThinkTags) -> None:
        self._tags = tags
        self.phase = Phase.INSIDE if tags.opened_by_prompt else Phase.OUTSIDE
        self.reasoning_tokens = 0  # the tags themselves are not counted

    def observe(self, token_id: int) -> None:
        """Takes the next token of the answer into account."""
        if self.phase is Phase.OUTSIDE and token_id == self._tags.open_id:
            self.phase = Phase.INSIDE
        elif self.phase is Phase.INSIDE:
            self._observe_inside(token_id)

    def _observe_inside(self, token_id: int) -> None:
        if token_id == self._tags.close_id:
            self.phase = Phase.CLOSED
        elif token_id != self._tags.open_id:  # a model may repeat the tag its prompt ended with
            self.reasoning_tokens += 1
