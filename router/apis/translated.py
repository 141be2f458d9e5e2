"""Bodies of other APIs, each turned into the chat request that it amounts to."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from replicas.errors import TriadError
from replicas.messages import NUM_SEEDS
from router.answering import error_as_sent
from router.chat import TemplateKwargs
from router.completion import MAX_CACHE_SALT_LEN, MAX_PRIORITY, MAX_TIMEOUT_S, TokenBudget
from router.decoding import Decoding
from router.errors import param_name
from router.fields import INTEGRAL, Neutral, Prompted, Text, conflict, unicode
from router.schema import ChatCompletionRequest

AllowedCallers = Annotated[Any, Neutral(["direct"])]
"""What may call a function: the model, and no program of its, which nothing here runs."""


def text_as(type_: str, parts: Any) -> BeforeValidator:
    """Takes a text in the place of a list of parts, as one part of this type.

    parts: the list's type. The text is checked here, where a fault is named as the field that was sent.
    """

    def check(value: Any) -> Any:
        return [{"type": type_, "text": unicode(value)}] if isinstance(value, str) else value

    return BeforeValidator(check, json_schema_input_type=str | parts)


class TranslatedRequest(Prompted):
    """A body that becomes a chat request when it is read. Triad's and vLLM's further fields go with any."""

    names: ClassVar[Sequence[tuple[str, str]]]
    """Names of a chat's fields, as patterns, with those of this body's."""

    model: str | None = None
    decoding: Decoding | None = None
    seed: Annotated[int, Field(ge=-NUM_SEEDS, lt=NUM_SEEDS), INTEGRAL] | None = None
    timeout_s: Annotated[float, Field(gt=0.0, le=MAX_TIMEOUT_S)] | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY), INTEGRAL] | None = None
    cache_salt: Annotated[Text, Field(min_length=1, max_length=MAX_CACHE_SALT_LEN)] | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    thinking_token_budget: TokenBudget | None = None
    _chat: ChatCompletionRequest = PrivateAttr()

    def fields_of_chat(self) -> Mapping[str, Any]:
        """The fields of the chat request, but for those that have the same name and meaning."""
        raise NotImplementedError

    def _messages(self) -> list[tuple[dict[str, Any], str]]:
        """The chat's messages, each with this body's name of what it is made of."""
        raise NotImplementedError

    def own_name(self, param: str) -> str:
        """This body's name for the chat request's field."""
        for pattern, name in self.names:
            param, num = re.subn(pattern, name, param)
            if num:
                return param
        place = re.match(r"messages\[(\d+)\]", param)
        if place is None:
            return self.prompt_field if param == "messages" else param
        return [name for _, name in self._messages()][int(place[1])]

    @model_validator(mode="after")
    def _translate(self) -> Self:
        same = {
            name: value
            for name in TranslatedRequest.model_fields
            if (value := getattr(self, name)) is not None
        }
        try:
            self._chat = ChatCompletionRequest.model_validate(same | dict(self.fields_of_chat()))
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            field = problem.get("ctx", {}).get("field")
            param = param_name([*problem["loc"], *([field] if field else [])])
            raise conflict(self._told(param) or self.prompt_field, problem["msg"]) from None
        return self

    @property
    def chat(self) -> ChatCompletionRequest:
        return self._chat

    @property
    def num_prompt_chars(self) -> int:
        return self._chat.num_prompt_chars

    def error_as_sent(self, error: TriadError) -> TriadError:
        """The error in this body's own names."""
        error = error_as_sent(error, self._chat)
        param = self._told(error.param)
        return error if param == error.param else TriadError(error.code, error.message, param)

    def _told(self, param: str | None) -> str | None:
        return None if param is None else self.own_name(param)
