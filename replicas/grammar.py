"""JSON schemas as grammars over token ids, by llguidance: the replica's implementation of engine.grammar."""

import threading
from collections import OrderedDict
from collections.abc import Sequence, Set

from llguidance import LLMatcher, LLTokenizer

from replicas.engine.grammar import GrammarFailed
from replicas.errors import ErrorCode, TriadError
from replicas.messages import JsonFormat

MAX_CACHED = 64
_WHITESPACE = r"[ \n\r\t]{1,32}"
"""Between tokens of JSON; without a bound a model may go on with it for ever."""


class JsonGrammar:
    """Implements engine.grammar.Grammar."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def masks(self, draft: Sequence[int]) -> tuple[bytes, ...]:
        matcher = self._matcher
        masks = [self._mask()]
        for token in draft:
            if matcher.is_stopped() or not matcher.try_consume_tokens([token]):
                break
            masks.append(self._mask())
        if len(masks) > 1:
            matcher.rollback(len(masks) - 1)
        return tuple(masks)

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)

    def _mask(self) -> bytes:
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise GrammarFailed(self._matcher.get_error().partition("\n")[0])
        return mask


class GrammarCompiler:
    """Compiles schemas; keeps the MAX_CACHED used last. From any thread.

    tokenizer_json: the text of a tokenizer.json. vocab_size: of the model's logits.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Set[int]):
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[JsonFormat, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, asked: JsonFormat) -> JsonGrammar:
        """A grammar at its beginning. Takes up to a second. TriadError says what is wrong with a schema."""
        with self._lock:
            matcher = self._compiled.get(asked)
            if matcher is None:
                matcher = self._compiled[asked] = self._compile(asked)
                if len(self._compiled) > MAX_CACHED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(asked)
            return JsonGrammar(matcher.deep_copy())

    def _compile(self, asked: JsonFormat) -> LLMatcher:
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        grammar = LLMatcher.grammar_from_json_schema(
            asked.schema,
            overrides={
                "whitespace_pattern": _WHITESPACE,
                "whitespace_flexible": True,
                "lenient": asked.best_effort,
                "coerce_one_of": asked.best_effort,
            },
        )
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            problem = matcher.get_error().partition("<state>")[0].strip().rstrip(".")
            hint = "" if asked.best_effort else '; with "strict": false what can\'t be enforced is left out'
            message = f"the schema can't be enforced: {problem}{hint}"
            raise TriadError(ErrorCode.INVALID_REQUEST, message, "response_format.json_schema.schema")
        return matcher

    def _load_tokenizer(self) -> LLTokenizer:
        try:
            return LLTokenizer(self._tokenizer_json, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
        except Exception as error:  # its own Rust errors have no common class
            message = f"this model's tokenizer does not allow structured output: {error}"
            raise TriadError(ErrorCode.INVALID_REQUEST, message, "response_format") from error
