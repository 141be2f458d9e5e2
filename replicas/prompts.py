"""Prompts to token ids, so that no text of a user becomes a control token.

A control token of a prompt is one that the chat template writes, or the tokenizer adds by itself, or that
came as an id. A user's text is text, whatever it spells. So that the two can't be mixed up, control tokens
have other names here, which nobody can know: the template's own text is rewritten to these names, and so is
the tokenizer that reads what the template renders. Nothing is searched or cut out of the users' texts, so
what templates do to them makes no difference, nor does it matter where two of them meet.
"""

import inspect
import json
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateSyntaxError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from replicas.answer_forms import ToolUse
from replicas.errors import ErrorCode, TriadError, context_exceeded
from replicas.messages import TEMPLATE_DEFAULTS, Message, TemplateOptions
from replicas.model.config import CheckpointError
from replicas.prompt_length import chars_per_token, fewest_tokens
from replicas.tools.prompts import (
    for_template,
    knows_tools,
    spelled_out,
    wants_short_ids,
    with_short_ids,
)

_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters) | {
    "messages",
    "raise_exception",
    "strftime_now",
}
"""Names by which transformers itself takes options, or gives a template what it works with."""
_CONTROL_NAME = re.compile(r"<[|｜].*[|｜]>")
"""The spelling of control tokens that a tokenizer.json does not call special, as some of DeepSeek's."""
_PROBES: tuple[tuple[Mapping[str, str], ...], ...] = (
    ({"role": "user", "content": "one two"},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "one\ntwo"}),
    (
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two three"},
        {"role": "user", "content": "four"},
    ),
)


class PromptEncoder:
    """Encodes texts and chats, in which no text becomes a control token. Safe from several threads.

    raw: the tokenizer's tokenizer.json
    control_ids: the model's ends of text and mask token; what the tokenizer calls special is control as well

    Raises CheckpointError for a chat template that does not compile.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, raw: Mapping[str, Any], control_ids: Collection[int] = ()
    ):
        self._tokenizer = tokenizer
        self._secret = secrets.token_hex(8)
        self._aliases = {
            token["content"]: f"␟{self._secret}:{token['id']}␟"
            for token in raw["added_tokens"]
            if token["special"] or token["id"] in control_ids or _CONTROL_NAME.fullmatch(token["content"])
        }
        self._names = {alias: name for name, alias in self._aliases.items()}
        self._known = _any_of(self._aliases)
        self._backend = _renamed(raw, self._aliases)
        self._chars_per_token = chars_per_token(self._backend)
        for name, alias in self._aliases.items():
            if self._backend.token_to_id(alias) != tokenizer.backend_tokenizer.token_to_id(name):
                raise CheckpointError(f"tokenizer.json: the control token {name!r} can't be told from text")
        self._variables = {
            key: self._aliases.get(value, value)
            for key, value in tokenizer.special_tokens_map.items()
            if isinstance(value, str)
        }
        self.template = own = _own_template(tokenizer)
        self._template = None if own is None else self._known.sub(self._alias, own)
        self._knows_tools = knows_tools(own)
        self._shortens_ids = wants_short_ids(own)
        self._joins_names = False
        self._joins_names = self._template is not None and not self._agrees_with(tokenizer)

    def of_text(self, text: str, max_tokens: int | None = None, adds_tokens: bool = True) -> list[int]:
        """The ids of a text, with the tokens that the tokenizer itself adds to one, unless adds_tokens is
        false.

        TriadError, as when it must have more than max_tokens by its length alone: it is not encoded then.
        """
        return self._encode(text, "prompt", max_tokens, adds_tokens)

    def of_chat(
        self,
        messages: Sequence[Message],
        max_tokens: int | None = None,
        options: TemplateOptions = TEMPLATE_DEFAULTS,
        tools: ToolUse | None = None,
        adds_tokens: bool = False,
    ) -> list[int]:
        """The ids of a chat by its template, ready for the assistant's turn if `options` says nothing else.

        tools: what the template is to tell of; one that knows no tools has them spelled out in messages.
        TriadError when the template refuses the messages, or they are too long, as of_text says.
        """
        if max_tokens is not None and len(messages) > max_tokens:
            raise context_exceeded(
                max_tokens, f"has {len(messages)} messages, which are more tokens", "messages"
            )
        if self._template is None:
            message = "this model has no chat template; use /v1/completions with a prompt"
            raise TriadError(ErrorCode.INVALID_REQUEST, message, "messages")
        variables = self._checked(options.kwargs)
        try:
            if self._knows_tools:
                shown = with_short_ids(messages) if self._shortens_ids else messages
                variables |= {"tools": for_template(tools)}
            else:
                shown = spelled_out(messages, tools)
            text = self._render([dict(message) for message in shown], options, variables)
        except Exception as error:  # the template is the checkpoint's own program and may raise anything
            said = _any_of(self._names).sub(lambda found: self._names[found[0]], str(error))
            message = f"the model's chat template refuses these messages: {said or type(error).__name__}"
            raise TriadError(ErrorCode.INVALID_REQUEST, message, "messages") from error
        return self._encode(text, "messages", max_tokens, adds_tokens)

    def _checked(self, kwargs: str) -> dict[str, Any]:
        """A request's variables for the template. TriadError where one is the renderer's own."""
        variables: dict[str, Any] = json.loads(kwargs) if kwargs else {}
        for name in variables:
            if name in _RESERVED or name in self._variables:
                message = f"{name!r} is not a variable that a request may set; leave it out"
                raise TriadError(ErrorCode.INVALID_REQUEST, message, f"chat_template_kwargs.{name}")
        return variables

    def _encode(self, text: str, param: str, max_tokens: int | None, adds_tokens: bool) -> list[int]:
        if max_tokens is not None and fewest_tokens(len(text), self._chars_per_token) > max_tokens:
            raise context_exceeded(max_tokens, f"has {len(text)} characters, which are more tokens", param)
        try:
            # Unlike encode(), it gives up the GIL.
            (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=adds_tokens)
            return list(encoded.ids)
        except BaseException as error:  # a panic of its Rust code is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            message = f"the model's tokenizer can't read this text: {error}"
            raise TriadError(ErrorCode.INVALID_REQUEST, message, param) from error

    def _render(
        self, messages: list[dict[str, Any]], options: TemplateOptions, variables: dict[str, Any]
    ) -> str:
        """Renders a chat to a text in which the template's control tokens have their aliases."""
        turn = {
            "add_generation_prompt": options.add_generation_prompt,
            "continue_final_message": options.continue_final_message,
        }
        if not self._joins_names:
            more = self._variables | variables
            return _rendered(self._tokenizer, messages, chat_template=self._template, **turn, **more)
        # This template puts names together from parts, so they can be told in what it renders alone;
        # whole names that users spell are kept out of that.
        stand_ins = {name: f"␟{self._secret}={index}␟" for index, name in enumerate(self._aliases)}
        hidden = {stand_in: name for name, stand_in in stand_ins.items()}

        def masked(text: str) -> str:
            return self._known.sub(lambda found: stand_ins[found[0]], text)

        masked_variables = {name: _mapped(masked, value) for name, value in variables.items()}
        text = _rendered(self._tokenizer, _mapped(masked, messages), **turn, **masked_variables)
        return _any_of(hidden).sub(lambda found: hidden[found[0]], self._known.sub(self._alias, text))

    def _alias(self, found: re.Match[str]) -> str:
        return self._aliases[found[0]]

    def _agrees_with(self, tokenizer: PreTrainedTokenizerFast) -> bool:
        """True if chats without control tokens in them get the ids that the checkpoint's own files give."""
        for probe in _PROBES:
            messages = [dict(message) for message in probe]
            try:
                plain = _rendered(tokenizer, messages)
            except TemplateSyntaxError as error:
                raise CheckpointError(
                    f"the chat template can't be read: line {error.lineno}: {error}"
                ) from error
            except Exception:  # it may refuse a system message, say
                continue
            expected = tokenizer.backend_tokenizer.encode(plain, add_special_tokens=False).ids
            try:
                if self.of_chat(messages) != expected:
                    return False
            except TriadError:
                return False
        return True


def _own_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    if tokenizer.chat_template is None:
        return None
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:  # several, none of which is the default
        raise CheckpointError(f"tokenizer_config.json: chat_template: {error}") from error
    return template


def _rendered(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], **options: Any) -> str:
    given = {"add_generation_prompt": True} | options
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **given))


def _mapped(change: Callable[[str], str], value: Any) -> Any:
    """The value of JSON with each of its texts changed, names of members too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(change, item) for item in value]
    if isinstance(value, dict):
        return {change(name): _mapped(change, item) for name, item in value.items()}
    return value


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the names, longer ones first; it matches nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def _renamed(raw: Mapping[str, Any], names: Mapping[str, str]) -> Tokenizer:
    """The tokenizer with other names for some of its tokens, which keep their ids."""
    added = [
        {**token, "content": names.get(token["content"], token["content"])} for token in raw["added_tokens"]
    ]
    model = dict(raw["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in vocab.items()}
    else:  # Unigram: pieces with their scores, in the order of ids
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:  # a name that two pieces of text make up would be a way to the token
        model["merges"] = [merge for merge in model["merges"] if _merged(merge) not in names]
    renamed = {**raw, "added_tokens": added, "model": model, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(renamed))


def _merged(merge: str | list[str]) -> str:
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)
