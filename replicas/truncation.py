"""Chats that are longer than the context, made to fit by leaving out their first turns."""

from bisect import bisect_left
from collections.abc import Callable, Sequence

from replicas.errors import ErrorCode, TriadError
from replicas.messages import Message

Encode = Callable[[Sequence[Message]], list[int]]


def without_first_turns(
    messages: Sequence[Message], encode: Encode, max_context: int, num_wanted: int | None
) -> list[int]:
    """The token ids of a chat, without as many of its first turns as it takes to leave room.

    A turn begins with a user's message; the last one stays, and so do system messages before the first. A
    chat that leaves room for one token stays whole; from another is left out what it takes to leave room for
    num_wanted tokens, or where that is None for a quarter of the context.

    encode: a chat's token ids, of which it may raise CONTEXT_LENGTH_EXCEEDED if there are more than
    max_context. TriadError as encode raises it, and for a chat whose last turn alone leaves too little room.
    """

    def fitting(begin: int, room: int) -> list[int] | None:
        try:
            ids = encode([*messages[:num_leading], *messages[begin:]])
        except TriadError as error:
            if error.code is not ErrorCode.CONTEXT_LENGTH_EXCEEDED:
                raise
            return None
        return ids if len(ids) + room <= max_context else None

    num_leading = next((k for k, each in enumerate(messages) if each["role"] != "system"), len(messages))
    whole = fitting(num_leading, 1)
    if whole is not None:
        return whole
    room = max_context // 4 if num_wanted is None else num_wanted
    begins = [k for k in range(num_leading + 1, len(messages)) if messages[k]["role"] == "user"]
    place = bisect_left(begins, True, key=lambda begin: fitting(begin, room) is not None)
    found = fitting(begins[place], room) if place < len(begins) else None
    return encode(messages) if found is None else found
