"""What placement and admission are told of a request, which here is text and not yet tokens."""

from policies.placement import Wish
from policies.prefix import PrefixMap, prefix_keys
from replicas.messages import Finished, GenerateRequest, Prompt

CHARS_A_TOKEN = 4.0
"""Until the replicas' answers say better."""
_LEARNING_RATE = 0.05


class Wishes:
    """Remembers where prompts went, and how long this model's tokens are. One event loop."""

    def __init__(self) -> None:
        self._prefixes = PrefixMap()
        self._chars_a_token = CHARS_A_TOKEN

    def keys(self, request: GenerateRequest) -> tuple[int, ...]:
        """Of the first prompt, where there are several."""
        return prefix_keys(_content(request.prompts[0]))

    def wish(self, request: GenerateRequest, keys: tuple[int, ...], now_s: float) -> Wish:
        return Wish(request.decoding.mode, self._prefixes.held(keys, now_s), self.num_prompt_tokens(request))

    def num_prompt_tokens(self, request: GenerateRequest) -> int:
        """Of all prompts, an estimate but for those that are token ids."""
        return sum(self._num_tokens(_content(prompt)) for prompt in request.prompts)

    def sent(self, keys: tuple[int, ...], replica_id: str, now_s: float) -> None:
        self._prefixes.sent(keys, replica_id, now_s)

    def finished(self, request: GenerateRequest, event: Finished) -> None:
        """The replica has counted the prompt."""
        contents = [_content(prompt) for prompt in request.prompts]
        num_chars = sum(len(content) for content in contents if isinstance(content, str))
        num_tokens = event.num_prompt_tokens - sum(
            len(content) for content in contents if not isinstance(content, str)
        )
        if num_chars and num_tokens > 0:
            self._chars_a_token += _LEARNING_RATE * (num_chars / num_tokens - self._chars_a_token)

    def forget(self, replica_id: str) -> None:
        self._prefixes.forget(replica_id)

    def _num_tokens(self, content: str | tuple[int, ...]) -> int:
        return max(1, round(len(content) / self._chars_a_token)) if isinstance(content, str) else len(content)


def _content(prompt: Prompt) -> str | tuple[int, ...]:
    """Its text, messages in a row; what the chat template adds is the same for all."""
    if isinstance(prompt, str):
        return prompt
    parts: list[str] = []
    ids: list[int] = []
    for item in prompt:
        if isinstance(item, int):
            ids.append(item)
        else:
            parts += (item["role"], "\n", item["content"], "\n")
    return tuple(ids) if ids else "".join(parts)
