"""Ends an answer before its first stop string, of which nothing is ever sent.

Only the answer's content is searched, and not its reasoning: a stop string such as a blank line
would often end an answer before it began.
"""

from collections.abc import Sequence

from server.text.string_matching import first_match, unfinished_length


class StopStrings:
    """Takes content piece by piece; once `hit`, the answer is over."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        """Returns what is now certain to be sent: held text and `text`, up to a possible match."""
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
        """Returns the text held back, when no more text comes."""
        held, self._held = self._held, ""
        return held
