"""What an answer may say: grammars compiled for one vocabulary, and where a sequence stands in its.

A grammar holds for the answer alone. While the think block is open, and while its closing sequence
is being forced, the sequence is free. Before anything was said, the model may open the block
instead of beginning the answer; after closing it by itself, it may write what the closing sequence
has behind the tag, and then the answer begins.

Knows grammars as `llguidance` reads them (its Lark dialect, or JSON), and token ids; a mask is
bytes, and nothing here knows a tensor. Grammars are compiled in a thread of their own, and a
sequence is to run once its own is there: no step ever waits for one. The library is imported where
it is used: an engine whose requests bring no grammar runs without it.
"""

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Final

from mi_runtime.config import GrammarVocabulary
from mi_runtime.request import Phase
from mi_runtime.scheduling.thinking import ThinkingState

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MOST_KEPT: Final = 64  # compiled grammars
LONGEST_FAILURE: Final = 200  # characters of a message


def parser_limits() -> "LLParserLimits":
    """What a grammar may cost: some 100 ms to compile, and a few in the worst step."""
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
    """Why a grammar cannot be used, without a vocabulary; None: it can."""
    from llguidance import LLMatcher

    is_fault, messages = LLMatcher.validate_grammar_with_warnings(source, limits=parser_limits())
    return messages[0] if is_fault else None


class Grammars:
    """Compiled grammars of one vocabulary; those used last are kept."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._tokenizer = self._thread.submit(_read, vocabulary)
        self._kept: OrderedDict[str, Future[LLMatcher]] = OrderedDict()

    def state(self, source: str, thinking: ThinkingState | None) -> "GrammarState":
        """Of a new sequence under the grammar `source`."""
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
    """The grammar of one sequence, told each new token before its think block is."""

    def __init__(self, compiled: "Future[LLMatcher]", thinking: ThinkingState | None) -> None:
        self._compiled = compiled
        self._thinking = thinking
        self._own: LLMatcher | None = None  # from its first use on
        self._begun = False  # the answer has its first token
        self._led = 0  # tokens of the closing sequence that the model wrote behind its own tag
        self.exhausted = False  # nothing that the request allows can follow
        self.failure: str | None = None  # why the answer cannot be held to its grammar

    @property
    def ready(self) -> bool:
        """Whether the grammar is compiled, or has turned out not to compile."""
        return self._compiled.done()

    def wait(self, seconds: float) -> None:
        """Until `ready`, and no longer than so many seconds."""
        wait([self._compiled], seconds)

    @property
    def constrains(self) -> bool:
        """Whether the next token is the grammar's to allow."""
        thinking = self._thinking
        if thinking is None:
            return True
        return thinking.phase is not Phase.INSIDE and thinking.forced_token is None

    @property
    def extra_token(self) -> int | None:
        """A token that is allowed beside those of the grammar, and is none of the answer."""
        thinking = self._thinking
        if self._begun or thinking is None:
            return None
        if thinking.phase is Phase.OUTSIDE:
            return thinking.policy.open_id
        tail = () if thinking.forced_close else thinking.policy.tail
        return tail[self._led] if self._led < len(tail) else None

    @property
    def may_open_block(self) -> bool:
        """Whether the token beside the grammar's would open a think block."""
        return self._thinking is not None and self._thinking.phase is Phase.OUTSIDE

    @property
    def complete(self) -> bool:
        """Whether nothing but an end may follow what was said."""
        return self._begun and self._own is not None and self._own.is_stopped()

    def mask(self) -> bytes:
        """What may come next: a bit for each token id, lowest first. Empty where it failed."""
        matcher = self._matcher()
        if matcher is None:
            return b""
        mask = matcher.compute_bitmask()
        return b"" if self._failed(matcher) else mask

    def observe(self, token_id: int) -> None:
        """Takes the next token of the sequence, whosesoever it is."""
        thinking = self._thinking
        if not self.constrains:
            return
        if token_id == self.extra_token:
            assert thinking is not None
            self._led += thinking.phase is Phase.CLOSED
            return
        self._begun = True
        matcher = self._matcher()
        if matcher is not None and not matcher.consume_token(token_id):
            self._failed(matcher)

    def _matcher(self) -> "LLMatcher | None":
        """This sequence's own; None where there can be none."""
        if self._own is None and self.failure is None:
            try:
                self._own = self._compiled.result().deep_copy()
            except ValueError as error:  # of the tokenizer: a kind that the library cannot read
                self.failure = _bounded(f"this tokenizer allows no grammar: {error}")
            except ImportError as error:
                self.failure = _bounded(f"this machine has nothing to follow grammars: {error}")
        return self._own

    def _failed(self, matcher: "LLMatcher") -> bool:
        if matcher.is_error():
            self.failure = _bounded(f"the grammar cannot be followed: {matcher.get_error()}")
        return self.failure is not None


def _bounded(text: str) -> str:
    return text[:LONGEST_FAILURE]
