"""Why a pair cannot be served, said before any request is taken."""


class PairError(ValueError):
    """The two directories cannot be served as a pair; the message lists every reason."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("cannot serve this pair:\n" + "\n".join(f"  - {one}" for one in problems))
        self.problems = problems


class UnsupportedModel(ValueError):
    """A part of the model that no swap covers; the message names it."""
