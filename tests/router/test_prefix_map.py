import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.prefix_map import CHUNK_CHARS, HALF_LIFE_S, MAX_CHUNKS, MAX_HOLDERS, PrefixMap, prefix_keys

LONG = "".join(chr(97 + index % 26) for index in range(10 * CHUNK_CHARS))


def test_keys_agree_as_far_as_the_texts_do():
    other = LONG[: 3 * CHUNK_CHARS + 5] + "!" + LONG[3 * CHUNK_CHARS + 6 :]
    same = [a == b for a, b in zip(prefix_keys(LONG), prefix_keys(other), strict=True)]
    assert same == [True] * 3 + [False] * 7
    assert prefix_keys("short") == ()
    assert len(prefix_keys(LONG * 100)) == MAX_CHUNKS


@given(st.lists(st.integers(0, 9), max_size=400))
def test_token_ids_have_keys_too(ids):
    assert prefix_keys(tuple(ids)) == prefix_keys(ids)
    assert len(prefix_keys(ids)) == len(ids) // (CHUNK_CHARS // 4)


def test_the_share_held_is_that_of_the_common_beginning():
    prefixes = PrefixMap()
    prefixes.sent(prefix_keys(LONG), "a", 0.0)
    prefixes.sent(prefix_keys(LONG[: 5 * CHUNK_CHARS]), "b", 0.0)
    assert prefixes.held(prefix_keys(LONG), 0.0) == {"a": 1.0, "b": 0.5}
    assert prefixes.held(prefix_keys("z" * 1000), 0.0) == {}


def test_trust_halves_with_age_and_comes_back_with_use():
    prefixes = PrefixMap()
    keys = prefix_keys(LONG)
    prefixes.sent(keys, "a", 0.0)
    assert prefixes.held(keys, HALF_LIFE_S)["a"] == pytest.approx(0.5)
    prefixes.sent(keys, "a", HALF_LIFE_S)
    assert prefixes.held(keys, HALF_LIFE_S)["a"] == 1.0


def test_a_replica_that_is_gone_is_forgotten():
    prefixes = PrefixMap()
    prefixes.sent(prefix_keys(LONG), "a", 0.0)
    prefixes.forget("a")
    assert prefixes.held(prefix_keys(LONG), 0.0) == {}
    assert len(prefixes) == 0


def test_of_many_holders_the_latest_are_remembered():
    prefixes = PrefixMap()
    keys = prefix_keys(LONG)
    for number in range(MAX_HOLDERS + 2):
        prefixes.sent(keys, f"r{number}", float(number))
    prefixes.sent(keys, "r2", 9.0)
    assert set(prefixes.held(keys, 9.0)) == {"r2", "r3", "r4", "r5"}


@given(st.lists(st.tuples(st.text("ab", min_size=0, max_size=3), st.sampled_from("xyz")), max_size=60))
def test_it_never_outgrows_its_bound_and_shares_are_shares(sends):
    prefixes = PrefixMap(max_entries=7)
    for now_s, (letters, replica_id) in enumerate(sends):
        keys = prefix_keys("".join(letter * CHUNK_CHARS for letter in letters))
        prefixes.sent(keys, replica_id, float(now_s))
        assert len(prefixes) <= 7
        held = prefixes.held(keys, float(now_s))
        assert all(0.0 < share <= 1.0 for share in held.values())
        assert not keys or held[replica_id] == 1.0
