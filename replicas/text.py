"""The edge between text and token ids: prompts in, streamed text out. The engine knows ids only."""

import json
import re
from collections.abc import Set

from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from replicas.engine.plan import TokenLogprob
from replicas.errors import ErrorCode, TriadError
from replicas.grammar import GrammarCompiler
from replicas.messages import Prompt, TextLogprob
from replicas.prompt_len import max_chars_per_token

_BYTES: dict[str, int] = {char: byte for byte, char in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
"""Of byte-level tokenizers: what character stands for which byte."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
"""A single byte in a tokenizer of the SentencePiece kind, whose other pieces are text with ▁ for a space."""


class TextCodec:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._is_byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
        self._known_bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, checkpoint: str) -> "TextCodec":
        """checkpoint: a folder or a hub name."""
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(f"{checkpoint} has no tokenizer.json; a fast tokenizer is needed")
        return cls(tokenizer)

    def encode(self, prompt: Prompt) -> list[int]:
        """Chat messages by the chat template, text with the tokenizer's own special tokens, ids as they are.

        TriadError when the template refuses the messages.
        """
        if isinstance(prompt, str):
            return list(self._tokenizer.encode(prompt))
        ids = [item for item in prompt if isinstance(item, int)]
        messages = [dict(item) for item in prompt if not isinstance(item, int)]
        if not messages:
            return ids
        if self._tokenizer.chat_template is None:
            raise TriadError(
                ErrorCode.INVALID_REQUEST,
                "this model has no chat template; use /v1/completions with a prompt",
                "messages",
            )
        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # the template is the checkpoint's own program and may raise anything
            message = f"the model's chat template refuses these messages: {error}"
            raise TriadError(ErrorCode.INVALID_REQUEST, message, "messages") from error
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def grammars(self, vocab_size: int, eos_token_ids: Set[int]) -> GrammarCompiler:
        """For structured output in this tokenizer's tokens. vocab_size: of the model's logits."""
        backend = self._tokenizer.backend_tokenizer
        return GrammarCompiler(backend.to_str(), max(vocab_size, backend.get_vocab_size()), eos_token_ids)

    def max_prompt_chars(self, max_context: int) -> int | None:
        """A text of more characters has at least max_context tokens; None where that can't be told."""
        longest = max_chars_per_token(json.loads(self._tokenizer.backend_tokenizer.to_str()))
        return None if longest is None else longest * (max_context - 1)

    def stream(self, stop: tuple[str, ...] = ()) -> "TextStream":
        return TextStream(self._tokenizer, stop)

    def logprob(self, made: TokenLogprob, offset: int) -> TextLogprob:
        """offset: where the token's text begins in the completion, in characters."""
        top = tuple(TextLogprob(self.token_bytes(token), logprob) for token, logprob in made.top)
        return TextLogprob(self.token_bytes(made.token_id), made.logprob, offset, top)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for in a text, which may be part of a character; of a special one its name."""
        known = self._known_bytes.get(token_id)
        if known is None:
            known = self._known_bytes[token_id] = self._find_bytes(token_id)
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):
            return b""  # a row of the head beyond the tokenizer's vocabulary
        if token_id in self._special_ids:
            return piece.encode()
        if self._is_byte_level:
            if all(char in _BYTES for char in piece):
                return bytes(_BYTES[char] for char in piece)
            return piece.encode()  # a token added as text
        if (byte := _BYTE_PIECE.fullmatch(piece)) is not None:
            return bytes.fromhex(byte[1])
        return piece.replace("▁", " ").encode()


class TextStream:
    """One completion's text, as its tokens come.

    Text is held back while it may be the beginning of a stop string or of a character whose bytes
    are not all there.

    starts: for each token taken in, through the one that completed a stop, how many characters of
    decoded text came before it. num_released: the characters given out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...]):
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._undecoded: list[int] = []
        self._held = ""
        self._num_decoded = 0
        self.stopped = False
        self.starts: list[int] = []
        self.num_released = 0

    @property
    def num_tokens(self) -> int:
        return len(self.starts)

    def push(self, token_ids: tuple[int, ...]) -> str:
        """The text that has become certain. Takes nothing more once stopped."""
        released = ""
        for token in token_ids:
            if self.stopped:
                break
            self.starts.append(self._num_decoded)
            self._undecoded.append(token)
            text = self._decoder.step(self._tokenizer.backend_tokenizer, token)
            if text is not None:
                self._undecoded.clear()
                released += self._release(text)
        return released

    def finish(self) -> str:
        """What was held back, at the end of a text that no stop string ended."""
        if self.stopped:
            return ""
        rest = str(self._tokenizer.decode(self._undecoded, skip_special_tokens=True))
        released = self._release(rest) if rest else ""
        if self.stopped:
            return released
        held, self._held = self._held, ""
        self.num_released += len(held)
        return released + held

    def _release(self, text: str) -> str:
        self._num_decoded += len(text)
        self._held += text
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self.num_released += min(found)[0]
            return self._held[: min(found)[0]]
        num_held = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - num_held
        released, self._held = self._held[:cut], self._held[cut:]
        self.num_released += cut
        return released


def _overlap(text: str, stop: str) -> int:
    """The length of the longest proper beginning of stop that text ends with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
