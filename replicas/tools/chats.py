"""How the answers of chats are made and read with one model: its formats of calls and of reasoning."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from replicas.answer_forms import GrammarFormat, JsonFormat
from replicas.errors import ErrorCode, TriadError
from replicas.messages import SamplingParams
from replicas.text_stream import FIRST_MARK
from replicas.tools.formats import ToolFormat
from replicas.tools.grammar import AnswerGrammar
from replicas.tools.output import OutputParser
from replicas.tools.reasoning import ReasoningMarks


@dataclass(frozen=True, slots=True)
class ChatForm:
    """A model's formats.

    control_ids: its control tokens by name
    """

    calls: ToolFormat | None = None
    reasoning: ReasoningMarks | None = None
    control_ids: Mapping[str, int] = field(default_factory=dict)

    @property
    def control_tags(self) -> dict[str, int]:
        """Ids of the tags and marks that are control tokens of this model, by name."""
        marks = () if self.reasoning is None else (self.reasoning.begin, self.reasoning.end)
        tags = () if self.calls is None else self.calls.tags
        return {tag: self.control_ids[tag] for tag in (*tags, *marks) if tag in self.control_ids}

    @property
    def shown(self) -> dict[int, str]:
        """The characters that stand for control tags in the text that a parser reads, by token id."""
        return {token_id: chr(FIRST_MARK + k) for k, token_id in enumerate(self.control_tags.values())}

    def fitted(self, sampling: SamplingParams) -> SamplingParams:
        """The sampling without a bound on reasoning that asks nothing of this model. TriadError where one
        asks what the model does not do."""
        budget = sampling.thinking_token_budget
        if budget is None or self.reasoning is not None:
            return sampling
        if budget.needs_marks:
            message = (
                "this model has no marks of reasoning (its chat template shows none, or its configuration "
                "has reasoning_parser=none), so there is no thinking to bound; leave it out"
            )
            raise TriadError(ErrorCode.INVALID_REQUEST, message, "thinking_token_budget")
        return replace(sampling, thinking_token_budget=None)

    def check(self, sampling: SamplingParams) -> None:
        """Raises TriadError for what this model's formats don't allow."""
        if sampling.tools is None:
            return
        if self.calls is None:
            message = "this server takes no tools (its configuration has tool_parser=none); leave them out"
            raise TriadError(ErrorCode.INVALID_REQUEST, message, "tools")
        is_bare = self.calls.opening is None
        if is_bare and sampling.response_format is not None and not sampling.tools.is_required:
            message = (
                "this model's calls can't be told from an answer in JSON: leave out response_format, or "
                "ask with tool_choice for a call or for none"
            )
            raise TriadError(ErrorCode.INVALID_REQUEST, message, "response_format")

    def grammar(
        self, sampling: SamplingParams, begins_in_reasoning: bool
    ) -> JsonFormat | GrammarFormat | AnswerGrammar | None:
        """The order for a chat's answer; None where it may be anything."""
        if not sampling.needs_grammar:
            return None
        use = sampling.tools
        if use is None and self.reasoning is None:
            return sampling.response_format
        callable_ = [] if use is None else [t for t in enumerate(use.tools) if t[1].name in use.callable]
        # Descriptions say nothing to a grammar, and are not to make two of one.
        return AnswerGrammar(
            format="" if self.calls is None else self.calls.name,
            tools=tuple(replace(tool, description=None) for _, tool in callable_),
            places=tuple(place for place, _ in callable_),
            is_required=use is not None and use.is_required,
            is_parallel=use is None or use.is_parallel,
            answer=sampling.response_format,
            reasoning=self.reasoning,
            begins_in_reasoning=begins_in_reasoning,
            control_ids=tuple(self.control_tags.items()),
        )

    def parser(self, sampling: SamplingParams, begins_in_reasoning: bool) -> OutputParser | None:
        """A reader of one answer; None where all of it is text."""
        use = sampling.tools
        if use is None and self.reasoning is None:
            return None
        shown, ids = self.shown, self.control_tags
        return OutputParser(
            None if use is None else self.calls,
            () if use is None else use.callable,
            self.reasoning,
            begins_in_reasoning,
            lambda tag: shown[ids[tag]] if tag in ids else tag,
            is_required=use is not None and use.is_required,
            spelled={
                ord(shown[token_id]): tag if sampling.shows_special_tokens else None
                for tag, token_id in ids.items()
            },
        )
