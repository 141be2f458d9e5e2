"""The tokenizer: any text round-trips, and an entity is one token wherever it stands."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.thorough import examples
from training.evaluate import DEFAULT_CHECKPOINT
from training.tasks import words
from training.tokenizer import SPECIAL_TOKENS, train_tokenizer

CAPITALISED = (*words.NAMES, *words.SURNAMES, *words.CITIES, *words.TEAMS, *words.LANGUAGES, *words.CODENAMES,
               *words.DAYS, *words.MONTHS)  # fmt: skip
LOWER_CASE = (*words.ITEMS, *words.ANIMALS, *words.TOPICS, *words.VERBS)


@pytest.fixture(scope="module")
def shipped():
    return Tokenizer.from_file(str(DEFAULT_CHECKPOINT / "tokenizer.json"))


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@examples(100)
@given(st.text().filter(lambda text: "<|" not in text))
def test_any_text_round_trips(text):
    tokenizer = test_any_text_round_trips.tokenizer
    assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False) == text


test_any_text_round_trips.tokenizer = train_tokenizer(num_chats=300, vocab_size=600, seed=0)


@pytest.mark.parametrize("word", CAPITALISED)
def test_capitalised_words_are_one_context_free_token(shipped, word):
    (token,) = ids(shipped, word)
    for before, after in (
        (" ", " "),
        ('": "', '",'),
        ("\n", "\n"),
        (",", ","),
        ("| ", " |"),
        ("'", "'"),
        ("\n- ", ""),
    ):
        assert ids(shipped, f"x{before}{word}{after}").count(token) == 1


@pytest.mark.parametrize("word", LOWER_CASE)
def test_lower_case_words_are_one_token_with_their_space(shipped, word):
    (token,) = ids(shipped, f" {word}")
    for before, after in ((":", ","), (",", ", "), ("1.", "\n"), ("\n-", ":"), ("the", ".")):
        assert ids(shipped, f"{before} {word}{after}").count(token) == 1


def test_digits_are_split(shipped):
    assert len(ids(shipped, "48370")) == 5


def test_special_tokens_come_first(shipped):
    assert [shipped.id_to_token(i) for i in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)


def test_training_is_deterministic():
    once = train_tokenizer(num_chats=200, vocab_size=500, seed=1)
    assert once.to_str() == train_tokenizer(num_chats=200, vocab_size=500, seed=1).to_str()
