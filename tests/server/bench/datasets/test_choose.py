"""The letter in a reply, as the benchmarks' own scripts find it."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.bench.datasets.item import Item
from server.bench.datasets.registry import BENCHMARKS


def item(num_options: int = 4) -> Item:
    return Item("1", Path("v.mp4"), "", tuple("abcdef"[:num_options]), "A", "1")


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("B. a dog", "B"),
        ("(C)", "C"),
        ("D and B", "B"),  # A, B, C, D in this order, wherever it stands
        ("Answer: C", "A"),  # so does eval.py
        ("none. A", ""),  # only what stands before the first full stop
        ("", ""),
    ],
)
def test_vnbench(reply: str, letter: str) -> None:
    assert BENCHMARKS["vnbench"].choose(item(), reply) == letter


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        (" B\n", "B"),
        ("B) a dog", "B"),
        ("(B) a dog", "B"),
        ("the answer is (D) a cat (or C)", "D"),
        ("B. a dog", ""),  # the whole reply has to be the letter
        ("b", ""),
        ("F)", ""),  # no such option
        (")", ""),
        ("", ""),
    ],
)
def test_mlvu(reply: str, letter: str) -> None:
    assert BENCHMARKS["mlvu"].choose(item(), reply) == letter


def test_mlvu_with_six_options() -> None:
    assert BENCHMARKS["mlvu"].choose(item(6), "F)") == "F"


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("C", "C"),
        ("The best answer is: D.", "D"),
        ("I think it is (B), not A", "B"),
        ("Best answer: C", "B"),  # so does eval_your_results.py
        ("e", ""),
        ("", ""),
    ],
)
def test_videomme(reply: str, letter: str) -> None:
    assert BENCHMARKS["videomme"].choose(item(), reply) == letter


@pytest.mark.parametrize(
    ("reply", "letter"), [("C", "C"), ("Best answer: C", "C"), ("Best option: D", "D"), ("the E", "E"), ("D. A", "D")]
)
def test_longvideobench(reply: str, letter: str) -> None:
    assert BENCHMARKS["longvideobench"].choose(item(5), reply) == letter


def test_longvideobench_guesses_without_a_letter_and_always_the_same() -> None:
    benchmark = BENCHMARKS["longvideobench"]
    guesses = [benchmark.choose(Item(str(n), Path("v"), "", ("a", "b"), "A", ""), "i do not know") for n in range(50)]
    assert set(guesses) == {"A", "B"}
    assert guesses == [
        benchmark.choose(Item(str(n), Path("v"), "", ("a", "b"), "A", ""), "i do not know") for n in range(50)
    ]
