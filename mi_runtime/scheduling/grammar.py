"""Constrains answers to grammars: compiles them for one vocabulary and tracks each sequence.

A grammar applies to the answer only. While the think block is open, and while its closing sequence
is being forced, any token is allowed. Before the first token of the answer, the model may open the
think block instead; after it closed the block by itself, it may write the tokens that follow the
tag in the closing sequence, and then the answer begins.

Grammars are in the form that `llguidance` reads (its Lark dialect, or JSON). Masks are bytes; no
tensor is used here. Grammars are compiled in a separate thread, and a sequence starts when its
grammar is compiled, so that no step waits for one. The library is imported inside functions, since
an engine whose requests bring no grammar runs without it.
"""

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Final

from mi_runtime.config import GrammarVocabulary
from mi_runtime.request import Phase
from mi_runtime.scheduling.thinking import ThinkingState

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MOST_KEPT: Final = 64  # compiled grammars that are cached
LONGEST_FAILURE: Final = 200  # characters of a message


def parser_limits() -> "LLParserLimits":
    """Returns limits that keep compiling at about 100 ms, and the worst step at a few ms."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=25_000,
        max_lexer_states=50_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def fault_of(source: str) -> str | None:
    """Returns why a grammar cannot be used, or None. It needs no vocabulary."""
    from llguidance import LLMatcher

    is_fault, messages = LLMatcher.validate_grammar_with_warnings(source, limits=parser_limits())
    return messages[0] if is_fault else None


class Grammars:
    """A cache of grammars compiled for one vocabulary, least recently used evicted first."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._tokenizer = self._thread.submit(_read, vocabulary)
        self._kept: OrderedDict[str, Future[LLMatcher]] = OrderedDict()

    def state(self, source: str, thinking: ThinkingState | None) -> "GrammarState":
        """Returns the initial state of a sequence whose answer obeys the grammar `source`."""
        return GrammarState(self._compiled(source), thinking)

    def _compiled(self, source: str) -> "Future[LLMatcher]":
        if source not in self._kept:
            self._kept[source] = self._thread.submit(self._compile, source)
        self._kept.move_to_end(source)
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return self._kept[source]

    def _compile(self, source: str) -> "LLMatcher":
        from llguidance import LLMatcher

        return LLMatcher(self._tokenizer.result(), source, log_level=0, limits=parser_limits())


def _read(vocabulary: GrammarVocabulary) -> "LLTokenizer":
    from llguidance import LLTokenizer

    return LLTokenizer(vocabulary.tokenizer, eos_token=list(vocabulary.eos_token_ids))


class GrammarState:
    """Where one sequence is in its grammar.

    `observe` takes each new token, before the sequence's think block takes it.
    """

    def __init__(self, compiled: "Future[LLMatcher]", thinking: ThinkingState | None) -> None:
        self._compiled = compiled
        self._thinking = thinking
        self._matcher: LLMatcher | None = None  # created at its first use
        self._answer_begun = False  # the answer has its first token
        self._tail_written = 0  # tokens that the model wrote of the closing sequence after the tag
        self.exhausted = False  # no token that the request allows can follow
        self.failure: str | None = None  # why the grammar cannot be applied

    @property
    def ready(self) -> bool:
        """Whether the grammar is compiled, or has turned out not to compile."""
        return self._compiled.done()

    def wait(self, seconds: float) -> None:
        """Waits until the grammar is `ready`, for at most this many seconds."""
        wait([self._compiled], seconds)

    @property
    def constrains(self) -> bool:
        """Whether the grammar decides which tokens may come next."""
        thinking = self._thinking
        if thinking is None:
            return True
        return thinking.phase is not Phase.INSIDE and thinking.forced_token is None

    @property
    def extra_token(self) -> int | None:
        """A token outside the answer that is allowed in addition to those of the grammar."""
        thinking = self._thinking
        if self._answer_begun or thinking is None:
            return None
        if thinking.phase is Phase.OUTSIDE:
            return thinking.policy.open_id
        tail = () if thinking.forced_close else thinking.policy.tail
        return tail[self._tail_written] if self._tail_written < len(tail) else None

    @property
    def may_open_block(self) -> bool:
        """Whether `extra_token` would open a think block."""
        return self._thinking is not None and self._thinking.phase is Phase.OUTSIDE

    @property
    def complete(self) -> bool:
        """Whether the answer is complete: only its end may follow."""
        return self._answer_begun and self._matcher is not None and self._matcher.is_stopped()

    def mask(self) -> bytes:
        """Returns which tokens may come next: one bit per token id, lowest first.

        Returns an empty mask, which allows none, if the grammar has failed.
        """
        matcher = self._get_matcher()
        if matcher is None:
            return b""
        mask = matcher.compute_bitmask()
        return b"" if self._failed(matcher) else mask

    def observe(self, token_id: int) -> None:
        """Takes the next token of the sequence, whether it was sampled or forced."""
        thinking = self._thinking
        if not self.constrains:
            return
        if token_id == self.extra_token:
            assert thinking is not None
            self._tail_written += thinking.phase is Phase.CLOSED
            return
        self._answer_begun = True
        matcher = self._get_matcher()
        if matcher is not None and not matcher.consume_token(token_id):
            self._failed(matcher)

    def _get_matcher(self) -> "LLMatcher | None":
        """Returns this sequence's copy of the compiled grammar, or None if it has failed."""
        if self._matcher is None and self.failure is None:
            try:
                self._matcher = self._compiled.result().deep_copy()
            except ValueError as error:  # a tokenizer of a kind that the library cannot read
                self.failure = _bounded(
                    f"structured output is not supported for this tokenizer: {error}"
                )
            except ImportError as error:
                self.failure = _bounded(
                    f"structured output is not available (is llguidance installed?): {error}"
                )
        return self._matcher

    def _failed(self, matcher: "LLMatcher") -> bool:
        if matcher.is_error():
            self.failure = _bounded(f"a token violated the grammar: {matcher.get_error()}")
        return self.failure is not None


def _bounded(text: str) -> str:
    return text[:LONGEST_FAILURE]
