"""Estimates of a request for placement and admission, made of text since there are no tokens yet."""

import json

from replicas.errors import context_exceeded
from replicas.messages import Finished, GenerateRequest, ModelInfo, Prompt
from router.placement import PlacementRequest
from router.prefix_map import PrefixMap, prefix_keys

CHARS_A_TOKEN = 4.0
"""The characters of a token until the replicas' answers say better."""
MIN_CHARS_A_TOKEN, MAX_CHARS_A_TOKEN = 0.5, 8.0
"""The bounds of what is learnt: one client's odd texts are not to make nonsense of others' sizes."""
_LEARNING_RATE = 0.05


class PromptEstimator:
    """Remembers where prompts went, and how long this model's tokens are. One event loop."""

    def __init__(self) -> None:
        self._prefixes = PrefixMap()
        self._chars_a_token = CHARS_A_TOKEN

    def keys(self, request: GenerateRequest) -> tuple[int, ...]:
        """The prefix keys of the request's first prompt."""
        return prefix_keys(_content_of(request, request.prompts[0]), request.cache_salt)

    def placement_request(
        self, request: GenerateRequest, keys: tuple[int, ...], num_prompt_tokens: int, now_s: float
    ) -> PlacementRequest:
        return PlacementRequest(request.decoding.mode, self._prefixes.held(keys, now_s), num_prompt_tokens)

    def prompt_lens(self, request: GenerateRequest, max_context: int) -> list[int]:
        """The length of each prompt in tokens, an estimate but for those that are token ids."""
        lens = [self._num_tokens(_content_of(request, prompt)) for prompt in request.prompts]
        if not _is_shortened(request):
            return lens
        wanted = request.truncate_prompt_tokens
        kept = max_context if wanted is None or wanted < 0 else wanted
        return [min(length, kept) for length in lens]

    def sent(self, keys: tuple[int, ...], replica_id: str, now_s: float) -> None:
        self._prefixes.sent(keys, replica_id, now_s)

    def finished(self, request: GenerateRequest, event: Finished) -> None:
        """Learns the length of tokens from a prompt that the replica has counted."""
        if _is_shortened(request):
            return
        contents = [_content_of(request, prompt) for prompt in request.prompts]
        num_chars = sum(len(content) for content in contents if isinstance(content, str))
        num_tokens = event.num_prompt_tokens - sum(
            len(content) for content in contents if not isinstance(content, str)
        )
        if num_chars and num_tokens > 0:
            ratio = min(max(num_chars / num_tokens, MIN_CHARS_A_TOKEN), MAX_CHARS_A_TOKEN)
            self._chars_a_token += _LEARNING_RATE * (ratio - self._chars_a_token)

    def forget(self, replica_id: str) -> None:
        self._prefixes.forget(replica_id)

    def _num_tokens(self, content: str | tuple[int, ...]) -> int:
        return max(1, round(len(content) / self._chars_a_token)) if isinstance(content, str) else len(content)


def check_fits(request: GenerateRequest, model: ModelInfo) -> None:
    """Raises TriadError for a prompt that is longer than the context whatever its tokens are, so that no
    replica reads it only to refuse it."""
    if _is_shortened(request):
        return
    for prompt in request.prompts:
        if isinstance(prompt, str):
            num, max_num, unit, param = len(prompt), model.max_prompt_chars, "characters", "prompt"
        elif prompt and isinstance(prompt[0], int):
            num, max_num, unit, param = len(prompt), model.max_context - 1, "tokens", "prompt"
        else:
            num, max_num, unit, param = _least_chars(prompt), model.max_prompt_chars, "characters", "messages"
        if max_num is not None and num > max_num:
            counted = (
                f"has {num} input tokens" if unit == "tokens" else f"has {num} {unit}, which are more tokens"
            )
            raise context_exceeded(model.max_context, counted, param)


def _is_shortened(request: GenerateRequest) -> bool:
    """True if the replica leaves out what of the prompt is too long."""
    return request.truncate_prompt_tokens is not None or request.drops_turns


def _least_chars(prompt: Prompt) -> int:
    """The characters of a chat that surely reach the model: templates trim, and omit some of its answers."""
    messages = (item for item in prompt if not isinstance(item, int | str))
    return sum(len(item["content"].strip()) for item in messages if item["role"] == "user")


def _content_of(request: GenerateRequest, prompt: Prompt) -> str | tuple[int, ...]:
    """A prompt's content with the tools before it, where templates have them."""
    content, use = _content(prompt), request.sampling.tools
    if use is None or not isinstance(content, str):
        return content
    return "".join(f"{tool.name} {tool.description} {tool.parameters}\n" for tool in use.tools) + content


def _content(prompt: Prompt) -> str | tuple[int, ...]:
    """A prompt's text, or ids, messages in a row; what the chat template adds is the same for all."""
    if isinstance(prompt, str):
        return prompt
    parts: list[str] = []
    ids: list[int] = []
    for item in prompt:
        if isinstance(item, int):
            ids.append(item)
        else:
            parts += (item["role"], "\n", item["content"], "\n")
            if "tool_calls" in item:
                parts += (json.dumps(item["tool_calls"]), "\n")
    return tuple(ids) if ids else "".join(parts)
