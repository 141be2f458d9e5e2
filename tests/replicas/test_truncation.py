"""Chats that lose their first turns: the fewest that leave room, against trying all."""

from collections.abc import Sequence
from random import Random

import pytest

from replicas.errors import ErrorCode, TriadError, context_exceeded
from replicas.messages import Message
from replicas.truncation import without_first_turns

CONTEXT = 40


def encode(messages: Sequence[Message]) -> list[int]:
    """A token a character, and one more a message."""
    ids = [ord(char) for each in messages for char in f"{each['role'][0]}{each['content']}"]
    if len(ids) > 3 * CONTEXT:
        raise context_exceeded(CONTEXT, "has more", "messages")
    return ids


def a_chat(rng: Random) -> list[Message]:
    roles = ["system"] * rng.randint(0, 2)
    for _ in range(rng.randint(1, 6)):
        roles += ["user", *(["assistant", "tool"] * rng.randint(0, 2))]
    return [{"role": role, "content": "x" * rng.randint(0, 12)} for role in roles]


@pytest.mark.parametrize("seed", range(200))
def test_the_fewest_turns_are_left_out_that_leave_room(seed: int) -> None:
    rng = Random(seed)
    messages, num_wanted = a_chat(rng), rng.choice([None, 1, 5, 15, 60])
    leading = [each for each in messages if each["role"] == "system"]
    rest = messages[len(leading) :]
    begins = [k for k, each in enumerate(rest) if each["role"] == "user"]
    room = CONTEXT // 4 if num_wanted is None else num_wanted
    shorter = [leading + rest[begin:] for begin in begins[1:]]
    lengths = [sum(1 + len(each["content"]) for each in chat) for chat in (messages, *shorter)]
    fitting = [chat for chat, length in zip(shorter, lengths[1:], strict=True) if length + room <= CONTEXT]
    if lengths[0] + 1 <= CONTEXT:
        expected = messages
    elif fitting:
        expected = fitting[0]
    elif lengths[0] <= 3 * CONTEXT:
        expected = messages  # as it is, which the engine refuses
    else:
        with pytest.raises(TriadError) as caught:
            without_first_turns(messages, encode, CONTEXT, num_wanted)
        assert caught.value.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
        return
    assert without_first_turns(messages, encode, CONTEXT, num_wanted) == encode(expected)


def test_another_fault_of_a_chat_is_told() -> None:
    def refusing(messages: Sequence[Message]) -> list[int]:
        raise TriadError(ErrorCode.INVALID_REQUEST, "no such role", "messages")

    with pytest.raises(TriadError, match="no such role"):
        without_first_turns([{"role": "user", "content": "x"}], refusing, CONTEXT, None)
