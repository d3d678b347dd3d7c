"""The steps of first contact, the most valuable first."""

from dataclasses import dataclass
from typing import Final

TIME, FOLDER = "{seconds}", "{folder}"  # in a command: its time limit, and its output folder


@dataclass(frozen=True, slots=True)
class Step:
    """One process, `python -m …`, with its arguments and limits."""

    letter: str
    name: str
    command: tuple[str, ...]
    limit: int  # seconds
    least: int  # seconds left that make a start worthwhile
    memory: int = 0  # GiB of memory that the card must have
    margin: int = 10  # seconds between the deadline it gets and its end by force
    smoke: tuple[str, ...] = ("--smoke",)  # what a rehearsal adds


def gpu(*flags: str, model: str = "4b") -> tuple[str, ...]:
    return ("bench.gpu", "--model", model, *flags, "--seconds", TIME, "--out", FOLDER)


SERVED: Final = ("bench.gpu.http_rows", "--model", "4b", "--seconds", TIME, "--out", FOLDER)
STEPS: Final = (
    Step("a", "environment", ("bench.first_contact.environment",), 90, 10),
    Step("b", "kernels", ("bench.first_contact.gpu_tests", "kernels"), 75, 20),
    Step("c", "engine", ("bench.first_contact.gpu_tests", "engine"), 90, 30),
    Step("d", "pair", gpu("--only", "card,static,pair"), 150, 60),
    Step("e", "http", SERVED, 150, 80, margin=95),  # limit in seconds, counted from its start
    Step("f", "deltas", gpu("--only", "int8,int4"), 80, 40),
    Step("g", "batching", gpu("--only", "batching"), 60, 30),
    Step("h", "experts", gpu("--only", "card,static,pair", model="30b-a3b"), 150, 80, memory=130),
    Step("i", "compiled", gpu("--compile", "--only", "card,static,pair"), 150, 90),
    Step("j", "profile", ("bench.first_contact.decode_profile",), 75, 30),
)
