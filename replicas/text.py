"""The edge between text and token ids: prompts in, streamed text out. The engine knows ids only."""

import codecs
import json
import logging
import re
from collections.abc import Collection, Iterator, Set
from contextlib import contextmanager

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from replicas.engine.batch import TokenLogprob
from replicas.grammar import GrammarCompiler
from replicas.messages import Prompt, TextLogprob
from replicas.model.checkpoint import resolve_folder
from replicas.model.config import CheckpointError, ModelConfig
from replicas.prompt_length import chars_per_token
from replicas.prompts import PromptEncoder
from replicas.token_bytes import TokenBytes

_FIRST_MARK = 0xD800
"""The first of the surrogates that stand for control tokens a stop string names; no decoded text has them."""


_KNOWN_WARNINGS = (
    "You are using a model of type `nemotron_labs_diffusion` to instantiate a model of type",
    "Unrecognized keys in `rope_parameters`",
)
"""What transformers says of a config.json that only replicas.model.config reads, and reads strictly."""


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_KNOWN_WARNINGS)


@contextmanager
def _without_known_warnings() -> Iterator[None]:
    loggers = [
        logging.getLogger(f"transformers.{name}") for name in ("configuration_utils", "modeling_rope_utils")
    ]
    for logger in loggers:
        logger.addFilter(_is_news)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_news)


class TextCodec:
    """A checkpoint's tokenizer and chat template.

    control_ids: the model's ends of text and mask token, whatever the tokenizer says of them. Raises
    CheckpointError for a tokenizer or a template that can't be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, control_ids: Collection[int] = ()):
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        raw = json.loads(self._backend.to_str())
        self._bytes = TokenBytes(self._backend, raw["decoder"])
        self._prompts = PromptEncoder(tokenizer, raw, control_ids)
        self._special_ids: dict[str, int] = {
            str(self._backend.id_to_token(token_id)): token_id for token_id in self._bytes.special_ids
        }
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special_names = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @classmethod
    def load(cls, checkpoint: str) -> "TextCodec":
        """Loads the codec. Raises CheckpointError.

        checkpoint: a folder or a hub name
        """
        folder = resolve_folder(checkpoint)
        control_ids: set[int] = set()
        if (folder / "config.json").is_file():
            config = ModelConfig.from_folder(folder)
            control_ids = set(config.eos_token_ids)
            control_ids |= set() if config.mask_token_id is None else {config.mask_token_id}
        try:
            with _without_known_warnings():
                tokenizer = AutoTokenizer.from_pretrained(str(folder))
        except Exception as error:  # what it reads is the checkpoint's, and its errors have no common class
            raise CheckpointError(f"{folder}: the tokenizer can't be loaded: {error}") from error
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise CheckpointError(f"{checkpoint} has no tokenizer.json; a fast tokenizer is needed")
        return cls(tokenizer, control_ids)

    def encode(self, prompt: Prompt, max_tokens: int | None = None) -> list[int]:
        """Chat messages by the chat template, text with the tokenizer's own special tokens, ids as they are.

        What messages and texts spell is text: no control token comes of it. Safe from several threads.
        TriadError when the template refuses the messages, the tokenizer a text, or a prompt must have more
        than max_tokens by its length alone, which spares encoding it.
        """
        if isinstance(prompt, str):
            return self._prompts.of_text(prompt, max_tokens)
        ids = [item for item in prompt if isinstance(item, int)]
        messages = [item for item in prompt if not isinstance(item, int)]
        return self._prompts.of_chat(messages, max_tokens) if messages else ids

    def grammars(self, vocab_size: int, eos_token_ids: Set[int]) -> GrammarCompiler:
        """A compiler for structured output in this tokenizer's tokens.

        vocab_size: the number of the model's logits
        """
        size = max(vocab_size, self._backend.get_vocab_size())
        return GrammarCompiler(self._backend.to_str(), size, eos_token_ids)

    def max_prompt_chars(self, max_context: int) -> int | None:
        """The length above which a text has at least max_context tokens; None where that can't be told."""
        per_token = chars_per_token(self._backend)
        return None if per_token is None else per_token * (max_context - 1)

    def stream(
        self, stop: tuple[str, ...] = (), min_tokens: int = 0, continues_text: bool = False
    ) -> "TextStream":
        """A stream for the text of one completion.

        min_tokens: stop strings that these complete don't count
        continues_text: a text comes before the first token, so that a space at its beginning is one
        """
        marks: dict[int, str] = {}

        def mark(found: re.Match[str]) -> str:
            return marks.setdefault(self._special_ids[found[0]], chr(_FIRST_MARK + len(marks)))

        with_marks = tuple(self._special_names.sub(mark, each) for each in stop)
        return TextStream(
            self._bytes, tuple(dict.fromkeys(stop + with_marks)), marks, min_tokens, continues_text
        )

    def logprob(self, made: TokenLogprob, offset: int, is_first: bool = False) -> TextLogprob:
        """The log-probabilities of a token and its alternatives, with their bytes.

        offset: the place where the token's text begins in the completion, in characters; is_first:
        token_bytes's
        """
        top = tuple(TextLogprob(self.token_bytes(token, is_first), logprob) for token, logprob in made.top)
        return TextLogprob(self.token_bytes(made.token_id, is_first), made.logprob, offset, top)

    def token_bytes(self, token_id: int, is_first: bool = False) -> bytes:
        """The bytes of a token in a text, which may be part of a character; of a special token its name.

        is_first: it is at the beginning of a text, where SentencePiece has a space too many
        """
        return self._bytes.first(token_id) if is_first else self._bytes.further(token_id)


class TextStream:
    """One completion's text, as its tokens come: their bytes as UTF-8, control tokens left out.

    A U+FFFD stands for each longest run of bytes that begins a character and does not end it, and for each
    byte that can't begin one. Text is held back while it may be the beginning of a stop string or of a
    character whose bytes are not all there. The text ends before the stop string that is complete first; one
    that is complete with the first min_tokens tokens does not count. A stop string may name control tokens
    (marks: what stands for which in `stop`), as in '<|end|>', though they are not in the text.

    starts: for each token taken in, through the one that completed a stop, how many characters of decoded
    text came before its own. first: the index of the token at the text's beginning, where SentencePiece has a
    space too many; None while there is none. num_released: the characters given out.
    """

    def __init__(
        self,
        token_bytes: TokenBytes,
        stop: tuple[str, ...],
        marks: dict[int, str],
        min_tokens: int,
        continues_text: bool,
    ):
        self._bytes = token_bytes
        self._stop = stop
        self._marks = marks
        self._unmarked = dict.fromkeys(map(ord, marks.values()))
        self._min_tokens = min_tokens
        self._is_beginning = not continues_text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending = b""  # of a character that is not all there
        self._held = ""
        self._num_seen = 0  # characters and marks that were searched for stops
        self._num_protected = 0  # those of the first min_tokens tokens
        self._num_decoded = 0
        self._freed = ""
        self.stopped = False
        self.failure: Exception | None = None
        self.starts: list[int] = []
        self.first: int | None = None
        self.num_released = 0

    @property
    def num_tokens(self) -> int:
        return len(self.starts)

    def accept(self, token_id: int) -> bool:
        """Takes one more token in, its text for take(). True if the text ends with it. Never raises.

        After a failure, which ends it too, the text is of no use.
        """
        try:
            self._freed += self._push(token_id)
        except Exception as error:
            self.failure = error
        return self.stopped or self.failure is not None

    def take(self) -> str:
        """The text that has become certain since the last call."""
        freed, self._freed = self._freed, ""
        return freed

    def push(self, token_ids: tuple[int, ...]) -> str:
        """The text that has become certain. Takes nothing more once stopped."""
        released = ""
        for token in token_ids:
            if self.stopped:
                break
            released += self._push(token)
        return released

    def finish(self) -> str:
        """The text that was held back, at the end of a completion that no stop string ended."""
        if self.stopped:
            return ""
        rest = self._utf8.decode(b"", True)
        released = self._release(rest, len(rest))
        if self.stopped:
            return released
        held, self._held = self._held, ""
        return released + self._visible(held)

    def _push(self, token_id: int) -> str:
        if token_id in self._bytes.special_ids:
            self.starts.append(self._num_decoded)
            mark = self._marks.get(token_id)
            return "" if mark is None else self._release(mark, 0)
        if self._is_beginning:
            self._is_beginning = False
            self.first = self.num_tokens
            piece = self._bytes.first(token_id)
        else:
            piece = self._bytes.further(token_id)
        num_broken = _num_broken(self._pending, piece) if self._pending else 0
        self.starts.append(self._num_decoded + num_broken)
        text = self._utf8.decode(piece)
        if self._pending or not piece.isascii():
            self._pending = self._utf8.getstate()[0]
        return self._release(text, len(text))

    def _release(self, text: str, num_decoded: int) -> str:
        self._num_decoded += num_decoded
        if not self._stop:
            self.num_released += len(text)
            return text
        self._held += text
        self._num_seen += len(text)
        if self.num_tokens <= self._min_tokens:
            self._num_protected = self._num_seen
        if (found := self._find_stop()) is not None:
            self.stopped = True
            return self._visible(self._held[:found])
        num_held = max(_overlap(self._held, stop) for stop in self._stop)
        cut = len(self._held) - num_held
        released, self._held = self._held[:cut], self._held[cut:]
        return self._visible(released)

    def _find_stop(self) -> int | None:
        """The place in the held text of the stop string that is complete first, the longest of several."""
        protected = self._num_protected - (self._num_seen - len(self._held))
        found = []
        for stop in self._stop:
            begin = self._held.find(stop, max(0, protected - len(stop) + 1))
            if begin >= 0:
                found.append((begin + len(stop), begin))
        return min(found)[1] if found else None

    def _visible(self, text: str) -> str:
        """The part of a decoded text without marks; counts it as given out."""
        if self._marks:
            text = text.translate(self._unmarked)
        self.num_released += len(text)
        return text


def _num_broken(pending: bytes, piece: bytes) -> int:
    """Characters that the pending bytes are by themselves; 0 where the piece goes on with them."""
    if len((pending + piece[:1]).decode(errors="replace")) == 1:
        return 0
    return len(pending.decode(errors="replace"))


def _overlap(text: str, stop: str) -> int:
    """The length of the longest proper beginning of stop that text ends with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
