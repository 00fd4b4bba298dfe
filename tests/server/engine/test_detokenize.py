from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.engine.detokenize import Detokenizer, StopStrings
from server.models.tiny.tokenizer import FOLDER

TINY = PreTrainedTokenizerFast.from_pretrained(FOLDER)


def byte_level() -> PreTrainedTokenizerFast:
    """Bytes as tokens, as in GPT-2's and Qwen's families."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES = byte_level()


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@given(st.text(max_size=30))
def test_pieces_are_the_whole_and_never_half_a_character(text: str) -> None:
    ids = BYTES.encode(text, add_special_tokens=False)
    parts = pieces(BYTES, ids)
    assert "".join(parts) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@given(st.lists(st.integers(0, 255), max_size=30))
def test_any_bytes_give_what_decoding_them_at_once_gives(ids: list[int]) -> None:
    assert "".join(pieces(BYTES, ids)) == BYTES.decode(ids, clean_up_tokenization_spaces=False)


@given(st.text(max_size=30))
def test_the_bundled_tokenizer_streams_what_it_decodes(text: str) -> None:
    ids = TINY.encode(text, add_special_tokens=False)
    assert "".join(pieces(TINY, ids)) == TINY.decode(ids, skip_special_tokens=True)  # such as "<end>"


@given(st.lists(st.integers(0, 1023), max_size=40))
def test_any_tokens_of_the_bundled_model_stream(ids: list[int]) -> None:
    parts = pieces(TINY, ids)
    assert not any("<end>" in part or "<s>" in part for part in parts)


def test_the_first_piece_comes_with_the_first_whole_character() -> None:
    ids = BYTES.encode("é€😀", add_special_tokens=False)
    assert pieces(BYTES, ids) == ["", "é", "", "", "€", "", "", "", "😀", ""]
    assert pieces(BYTES, ids[:-1])[-1] == "\ufffd"


def stream(stop: list[str], parts: list[str]) -> tuple[str, bool]:
    stops = StopStrings(stop)
    text = "".join([*map(stops.push, parts), stops.flush()])
    return text, stops.met


@pytest.mark.parametrize(
    ("stop", "parts", "expected"),
    [
        (["STOP"], ["one ST", "OP two"], ("one ", True)),
        (["STOP"], ["one ST", "ART"], ("one START", False)),
        (["STOP"], ["one ST"], ("one ST", False)),
        (["aab"], ["aa", "a", "b"], ("a", True)),
        (["abcd", "bc"], ["abcd"], ("a", True)),
        (["x", ""], ["", "y"], ("y", False)),
        ([], ["anything"], ("anything", False)),
    ],
)
def test_stop_strings(stop: list[str], parts: list[str], expected: tuple[str, bool]) -> None:
    assert stream(stop, parts) == expected


@given(st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.lists(st.text("ab", max_size=4), max_size=8))
def test_the_cut_does_not_depend_on_the_pieces(stop: list[str], parts: list[str]) -> None:
    text, met = stream(stop, parts)
    assert (text, met) == stream(stop, list("".join(parts)))
    assert not any(word in text for word in stop)
    assert met or text == "".join(parts)


@given(st.text("ab", min_size=1, max_size=3), st.text("ab", max_size=12))
def test_no_more_is_held_back_than_may_become_a_stop(stop: str, text: str) -> None:
    stops = StopStrings([stop])
    shown = "".join(map(stops.push, text))
    assert stops.met or len(text) - len(shown) < len(stop)
