"""The edge between text and token ids: prompts in, streamed text out. The engine knows ids only."""

import json
import logging
import re
from collections.abc import Collection, Iterator, Sequence, Set
from contextlib import contextmanager
from functools import cached_property

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from replicas.answer_forms import ToolUse
from replicas.engine.batch import TokenLogprob
from replicas.engine.grammar import Grammar
from replicas.grammar_compiler import GrammarCompiler
from replicas.messages import TEMPLATE_DEFAULTS, Prompt, SamplingParams, TemplateOptions, TextLogprob
from replicas.model.checkpoint import resolve_folder
from replicas.model.config import CheckpointError, ModelConfig
from replicas.prompt_length import chars_per_token
from replicas.prompts import PromptEncoder
from replicas.text_stream import FIRST_MARK, TextStream
from replicas.token_bytes import TokenBytes
from replicas.tools.chats import ChatForm
from replicas.tools.families import format_of
from replicas.tools.reasoning import marks_of
from replicas.tools.thinking_budget import BudgetedGrammar, SpelledMarks, continuations

NUM_LAST = 16
"""Tokens at a prompt's end in which the mark of reasoning's beginning may be."""


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

    control_ids: the model's ends of text and mask token, whatever the tokenizer says of them. tool_parser,
    reasoning_parser: as in replicas.config. Raises CheckpointError for a tokenizer or a template that can't
    be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        control_ids: Collection[int] = (),
        tool_parser: str = "auto",
        reasoning_parser: str = "auto",
    ):
        self._tokenizer = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        raw = json.loads(self._backend.to_str())
        self._bytes = TokenBytes(self._backend, raw["decoder"])
        self._prompts = PromptEncoder(tokenizer, raw, control_ids)
        self._special_ids: dict[str, int] = {
            str(self._backend.id_to_token(token_id)): token_id for token_id in self._bytes.special_ids
        }
        longest_first = sorted(self._special_ids, key=len, reverse=True)
        self._special_names = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        template = self._prompts.template
        self.chats = ChatForm(
            format_of(template, tool_parser), marks_of(template, reasoning_parser), self._special_ids
        )

    @classmethod
    def load(cls, checkpoint: str, tool_parser: str = "auto", reasoning_parser: str = "auto") -> "TextCodec":
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
        return cls(tokenizer, control_ids, tool_parser, reasoning_parser)

    def encode(
        self,
        prompt: Prompt,
        max_tokens: int | None = None,
        template: TemplateOptions = TEMPLATE_DEFAULTS,
        tools: ToolUse | None = None,
        adds_special_tokens: bool | None = None,
    ) -> list[int]:
        """Chat messages by the chat template, text with the tokenizer's own special tokens, ids as they are.

        adds_special_tokens: whether the tokenizer adds its own; None: to texts, and not to chats, whose
        template writes them
        What messages and texts spell is text: no control token comes of it. Safe from several threads.
        TriadError when the template refuses the messages, the tokenizer a text, or a prompt must have more
        than max_tokens by its length alone, which spares encoding it.
        """
        if isinstance(prompt, str):
            return self._prompts.of_text(prompt, max_tokens, adds_special_tokens is not False)
        ids = [item for item in prompt if isinstance(item, int)]
        messages = [item for item in prompt if not isinstance(item, int)]
        if not messages:
            return ids
        return self._prompts.of_chat(messages, max_tokens, template, tools, adds_special_tokens is True)

    def piece(self, token_id: int) -> str:
        """The vocabulary's own spelling of a token; nothing for an id that it does not have."""
        return self._backend.id_to_token(token_id) or ""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, with the names of control tokens."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=False))

    def description(self) -> str:
        """What the tokenizer is, in the words of a tokenizer_config.json: a JSON object."""
        named = {
            name: str(token)
            for name, token in self._tokenizer.special_tokens_map.items()
            if isinstance(token, str)
        }
        return json.dumps(
            {
                "tokenizer_class": type(self._tokenizer).__name__,
                "vocab_size": len(self._tokenizer),
                **named,
                "additional_special_tokens": sorted(self._special_ids.keys() - named.values()),
                "chat_template": self._prompts.template,
            }
        )

    def begins_in_reasoning(self, prompt_ids: list[int]) -> bool:
        """True if a chat's prompt ends with the mark of reasoning's beginning, as some templates write it."""
        if self.chats.reasoning is None:
            return False
        end = str(self._backend.decode(prompt_ids[-NUM_LAST:], skip_special_tokens=False))
        return end.rstrip().endswith(self.chats.reasoning.begin)

    def budgeted(self, grammar: Grammar | None, num_tokens: int, prompt_ids: list[int]) -> BudgetedGrammar:
        """An answer's grammar with so many tokens of reasoning at most. Only for a model with marks of it."""
        return BudgetedGrammar(grammar, self._spelled_marks, num_tokens, self.begins_in_reasoning(prompt_ids))

    @cached_property
    def _spelled_marks(self) -> SpelledMarks:
        marks = self.chats.reasoning
        assert marks is not None
        tags = {
            token_id: f"\udcff{tag}".encode(errors="surrogateescape")
            for tag, token_id in self.chats.control_tags.items()
        }

        def spelled(mark: str) -> bytes:
            token_id = self._special_ids.get(mark)
            return mark.encode() if token_id is None else tags[token_id]

        def bytes_of(token_id: int) -> bytes:
            if token_id in self._bytes.special_ids:
                return tags.get(token_id, b"")
            return self._bytes.further(token_id)

        control_id = self._special_ids.get(marks.end)
        closing = self._backend.encode(marks.end, add_special_tokens=False).ids
        return SpelledMarks(
            spelled(marks.begin),
            spelled(marks.end),
            tuple(closing) if control_id is None else (control_id,),
            continuations(self._bytes.of_byte),
            bytes_of,
        )

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
        self,
        stop: tuple[str, ...] = (),
        min_tokens: int = 0,
        continues_text: bool = False,
        *,
        stop_token_ids: Collection[int] = (),
        includes_stop: bool = False,
        shown_special_ids: Set[int] = frozenset(),
        shows_tags: bool = False,
    ) -> TextStream:
        """A stream for the text of one completion.

        min_tokens: stop strings that these complete don't count, nor stop tokens among them
        continues_text: a text comes before the first token, so that a space at its beginning is one
        stop_token_ids: tokens that end the text
        includes_stop: the text has what ended it
        shown_special_ids: control tokens whose names the text has
        shows_tags: the characters of `chats.shown` stand in the text where their control tokens come
        """
        tags = self.chats.shown if shows_tags else {}
        marks: dict[int, str] = dict(tags)

        def mark(found: re.Match[str]) -> str:
            return marks.setdefault(self._special_ids[found[0]], chr(FIRST_MARK + len(marks)))

        forms = {self._special_names.sub(mark, each): each for each in stop}
        return TextStream(
            self._bytes,
            forms | {each: each for each in stop},
            marks,
            min_tokens,
            continues_text,
            frozenset(stop_token_ids),
            includes_stop,
            shown_special_ids - tags.keys(),
            tags.keys(),
        )

    def completion(
        self,
        sampling: SamplingParams,
        eos_token_ids: Set[int],
        continues_text: bool,
        shows_tags: bool = False,
    ) -> TextStream:
        """A stream for the text of a completion that is sampled so.

        continues_text, shows_tags: as stream() has them
        """
        shown: Set[int] = frozenset()
        if sampling.shows_special_tokens:
            hides_end = not sampling.ignore_eos and not sampling.includes_stop
            shown = self._bytes.special_ids - (eos_token_ids if hides_end else frozenset())
        return self.stream(
            sampling.stop,
            sampling.min_tokens,
            continues_text,
            stop_token_ids=sampling.stop_token_ids,
            includes_stop=sampling.includes_stop,
            shown_special_ids=shown,
            shows_tags=shows_tags,
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
