from __future__ import annotations

import re
import string
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from server.models.tiny import tokenizer
from server.models.tiny.world import SYMBOLS

TOKENIZER = tokenizer.load()
QUESTION = "What code is on the upper blue label of the red star"


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


def test_the_committed_file_is_what_the_recipe_builds() -> None:
    assert TOKENIZER.to_str() == tokenizer.build().to_str()
    assert TOKENIZER.get_vocab_size() <= 1024


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_every_text_encodes_and_comes_back(text: str) -> None:
    if any(special in text for special in tokenizer.SPECIALS):
        return
    tokens = ids(text)
    assert all(0 <= token < 1024 for token in tokens)
    plain = "".join(c for c in unicodedata.normalize("NFKC", text).lower() if not c.isspace() and c.isalnum())
    again = TOKENIZER.decode(tokens)
    assert "".join(c for c in again if c.isalnum()) == plain


@given(st.lists(st.sampled_from([*QUESTION.split(), "k7x", "01:05", "déjà", "xyzzy"]), min_size=1, max_size=12))
def test_known_and_unknown_words_round_trip(words: list[str]) -> None:
    text = " ".join(words).lower()
    assert TOKENIZER.decode(ids(text)) == text


@given(st.text(string.ascii_letters + string.digits + " ?!.,;\"'()", max_size=50))
def test_case_and_sentence_punctuation_change_nothing(text: str) -> None:
    assert ids(text) == ids(text.upper()) == ids(re.sub(r"[^a-z0-9]+", " ", text.lower()))


@pytest.mark.parametrize(
    "written",
    [
        f"{QUESTION}?",
        f"  {QUESTION.upper()} ?!",
        f"“{QUESTION}.”",
        QUESTION.replace("red star", "red-star"),
        f"{QUESTION}…",
    ],
)
def test_a_question_is_the_same_however_it_is_typed(written: str) -> None:
    assert ids(written) == ids(QUESTION)
    assert len(ids(QUESTION)) == len(QUESTION.split())


def test_codes_and_times_are_one_token_a_character() -> None:
    assert TOKENIZER.encode("k7x", add_special_tokens=False).tokens == ["▁", "<0x6B>", "<0x37>", "<0x78>"]
    time = TOKENIZER.encode("at 01:05:", add_special_tokens=False).tokens
    assert time == ["▁at", "▁", "<0x30>", "<0x31>", "<0x3A>", "<0x30>", "<0x35>"]


@pytest.mark.parametrize(
    "answer",
    ["K7X", "K7X and P2M", "01:05", "01:05 and 02:30, so the red star", "Yes", "No", "red star", "3", "RED",
     "I cannot tell that from the video.", "There is no red star in the video.", "Hello! Ask me about the video.",
     "I see no video here.", "red star at 00:00, blue ring at 00:06, green moon at 00:12"],
)  # fmt: skip
def test_answers_keep_case_and_punctuation_and_stream_token_by_token(answer: str) -> None:
    tokens = tokenizer.encode_answer(answer)
    assert TOKENIZER.decode(tokens) == answer
    shown = ""
    for end in range(1, len(tokens) + 1):
        text = TOKENIZER.decode(tokens[:end])
        assert text.startswith(shown)
        shown = text
    assert shown == answer


@given(st.text(SYMBOLS, min_size=3, max_size=3))
def test_a_code_is_three_answer_tokens(code: str) -> None:
    assert len(tokenizer.encode_answer(code)) == 3
    assert TOKENIZER.decode(tokenizer.encode_answer(code)) == code


def test_transformers_loads_the_folder_and_its_chat_template() -> None:
    loaded = PreTrainedTokenizerFast.from_pretrained(str(tokenizer.FOLDER))
    assert loaded(QUESTION, add_special_tokens=False)["input_ids"] == ids(QUESTION)
    assert (loaded.pad_token, loaded.bos_token, loaded.eos_token) == ("<pad>", "<s>", "<end>")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Is there a red star?"}]},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "When does it appear?"},
    ]
    text = loaded.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "Be brief. Is there a red star? <assistant>Yes<end><user>When does it appear? <assistant>"
    spoken = "be brief is there a red star<assistant>yes<end><user>when does it appear<assistant>"
    assert loaded(text, add_special_tokens=False)["input_ids"] == ids(spoken)


def test_the_prefix_is_short_and_starts_and_ends_with_its_marks() -> None:
    tokens = TOKENIZER.encode(tokenizer.PREFIX, add_special_tokens=False).tokens
    assert tokens == ["<s>", "▁you", "▁are", "▁a", "▁helpful", "▁video", "▁assistant", "<user>"]
