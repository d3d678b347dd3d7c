"""Stop strings: the answer ends before the first one, and no part of one is ever shown.

They look at the answer's content only. Reasoning is the model's own scratch paper: a stop string
such as a blank line would otherwise end an answer before it began.
"""

from collections.abc import Sequence

from server.text.string_matching import first_match, unfinished_length


class StopStrings:
    """Feed it content; once `hit`, the answer is over."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        """The part of the content so far that is certain and was not given out yet."""
        if not self._strings:
            return text
        text = self._held + text
        match = first_match(text, self._strings)
        if match is not None:
            self.hit, self._held = True, ""
            return text[: match.start]
        certain = len(text) - unfinished_length(text, self._strings)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held
