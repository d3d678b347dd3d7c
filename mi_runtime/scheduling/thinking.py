"""Tracks the think block of a sequence by token ids, and decides when the engine closes it.

It knows the token ids of the tags and no text: the tokens between the tags are the reasoning. A
sequence has at most one think block. Either the prompt opens it, or the first open tag in the
answer does, if only whitespace precedes it. Once it is closed, nothing opens it again. At the cap,
the closing sequence is forced token by token; in the window before the cap, it is forced at the end
of a sentence or a line.
"""

from mi_runtime.config import TokenMarks
from mi_runtime.request import Phase, ThinkPolicy


class ThinkingState:
    """The state of one sequence's think block. `observe` takes each new token in order."""

    def __init__(self, policy: ThinkPolicy, marks: TokenMarks | None = None) -> None:
        self._policy = policy
        self._marks = marks or TokenMarks()
        self._forced: tuple[int, ...] = ()  # tokens of the closing sequence yet to come
        self.phase = Phase.INSIDE if policy.opened_by_prompt else Phase.OUTSIDE
        self.reasoning_tokens = 0  # the tags and the forced closing sequence are not counted
        self.forced_close = False  # the engine closed the block, not the model
        self._close_if_due(None)

    @property
    def policy(self) -> ThinkPolicy:
        return self._policy

    @property
    def forced_token(self) -> int | None:
        """The token that must come next while the closing sequence is being forced, else None."""
        return self._forced[0] if self._forced else None

    @property
    def forbids_eos(self) -> bool:
        """Whether the answer may not end before the block is closed."""
        return self._policy.forbid_eos and self.phase is Phase.INSIDE

    def observe(self, token_id: int) -> bool:
        """Takes the next token of the answer, and returns whether it closed the block."""
        inside, forced = self.phase is Phase.INSIDE, bool(self._forced)
        if forced:
            assert token_id == self._forced[0]
            self._forced = self._forced[1:]
        elif inside:
            self._observe_inside(token_id)
        elif self.phase is Phase.OUTSIDE:
            self._observe_outside(token_id)
        if inside and token_id == self._policy.close_id:
            self.phase = Phase.CLOSED
            self.forced_close = forced
        return inside and self.phase is Phase.CLOSED

    def _observe_outside(self, token_id: int) -> None:
        whitespace = self._marks.whitespace
        if token_id == self._policy.open_id:
            self.phase = Phase.INSIDE
            self._close_if_due(None)
        elif whitespace is not None and token_id not in whitespace:
            self.phase = Phase.CLOSED  # the answer has begun: from here on a tag is text

    def _observe_inside(self, token_id: int) -> None:
        policy = self._policy
        if token_id in policy.close_aliases:
            self.phase = Phase.CLOSED
        elif token_id != policy.close_id:
            self.reasoning_tokens += 1
            self._close_if_due(token_id)

    def _close_if_due(self, token_id: int | None) -> None:
        cap = self._policy.cap
        if cap is None or self.phase is not Phase.INSIDE:
            return
        in_window = self.reasoning_tokens >= cap - self._policy.soft_window
        if self.reasoning_tokens >= cap or (in_window and token_id in self._marks.soft_ends):
            self._forced = self._policy.closing
