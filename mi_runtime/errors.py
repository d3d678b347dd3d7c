"""Errors that say why a pair cannot be served, raised before any request is accepted."""


class PairError(ValueError):
    """The two checkpoints cannot be served as a pair; the message lists every reason."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("cannot serve this pair:\n" + "\n".join(f"  - {one}" for one in problems))
        self.problems = problems


class UnsupportedModel(ValueError):
    """The model has a part that the pair modules cannot compute; the message names it."""
