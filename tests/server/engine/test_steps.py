"""Steps that are asked for ahead: whatever comes and goes meanwhile, answers are those of one token after the other."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from clips import Clip

from server.engine.errors import Cancelled
from server.engine.request import Delta
from server.models.base import Row, Step
from server.models.videoxl.model import VideoXL

Drive = Callable[..., Any]
WORDS = ("Hello?", "What is shown?", "When does it end?", "Why?")
NUM_ASKED, MOST_TOKENS = 50, 12
RUBBISH = [-1] * 64


class Device:
    """A StepDecoder that knows the last step's tokens by row alone, as a GPU does. Now and then a step fails when it is
    asked for, or when it is waited for."""

    def __init__(self, model: VideoXL, rng: random.Random) -> None:
        self._model, self._rng = model, rng
        self._tokens = list(RUBBISH)
        self.num_failed, self.num_lost, self.sources = 0, 0, set[bool]()

    def step(self, rows: Sequence[Step]) -> Drawn:
        self.sources |= {row.source is None or row.source == place for place, row in enumerate(rows)}
        tokens = [row.token if row.source is None else self._tokens[row.source] for row in rows]
        self._tokens = list(RUBBISH)
        if len(rows) > 1 and self._rng.random() < 0.1:
            self.num_failed += 1
            raise RuntimeError("out of memory")
        logits = self._model.forward(
            [Row(torch.tensor([token]), row.cache) for token, row in zip(tokens, rows, strict=True)]
        )
        drawn = self._tokens[: len(rows)] = logits.argmax(-1).tolist()
        lost = self._rng.random() < 0.02
        self.num_lost += lost
        return Drawn(drawn, lost)


@dataclass
class Drawn:
    tokens: list[int]
    lost: bool

    def wait(self) -> list[int]:
        if self.lost:
            raise RuntimeError("lost")
        return self.tokens


@pytest.mark.parametrize("seed", range(3))
def test_answers_are_those_of_one_token_after_the_other(
    drive: Drive, fresh_model: Callable[..., VideoXL], four_chunks: Clip, seed: int
) -> None:
    rng, model = random.Random(seed), fresh_model()
    plain = drive(model=model, share_kvs=True)
    record = plain.upload(four_chunks)
    texts = {(place, word): plain.ask(place, word).text for place in (None, record) for word in WORDS}
    drawn = [model.tokenizer.encode(text, add_special_tokens=False) for text in texts.values()]
    model.end_ids = frozenset(rng.choice(ids[2:]) for ids in rng.sample(drawn, 3))
    cases: list[tuple[Any, str, dict[str, Any]]] = []
    for _ in range(NUM_ASKED):
        place, word = rng.choice(list(texts))
        text = texts[place, word]
        start = rng.randrange(len(text))
        stop = (text[start:][:3],) if rng.random() < 0.2 else ()
        params = {"max_tokens": rng.randint(1, MOST_TOKENS), "stop": stop, "ignore_eos": rng.random() < 0.7}
        cases.append((place, word, params))
    expected = [plain.ask(place, word, **params) for place, word, params in cases]

    device = Device(model, rng)
    model.step_decoder = lambda max_rows: device  # type: ignore[method-assign]
    driver = drive(plain.store, model=model, share_kvs=True, max_batch=3 + seed, max_queue=NUM_ASKED)
    answers, broken = [], set()
    submit = driver.engine.submit

    def submit_for_a_client_that_breaks(request: Any, on_delta: Callable[[Delta], None]) -> None:
        left = rng.randint(1, 4)

        def broken_on_delta(delta: Delta) -> None:
            nonlocal left
            on_delta(delta)
            left -= not delta.final
            if left == 0:
                raise OSError("the client has gone")

        submit(request, broken_on_delta)

    for place, word, params in cases:
        fate = rng.choice(["cancelled", "broken", *["fine"] * 4])
        driver.engine.submit = submit_for_a_client_that_breaks if fate == "broken" else submit
        answers.append(driver.start(place, word, **params))
        if fate == "broken":
            broken.add(answers[-1].id)
        elif fate == "cancelled":
            threading.Timer(rng.random() / 20, driver.engine.cancel, [answers[-1].id]).start()
        if rng.random() < 0.2:
            rng.choice(answers).first.wait(5)
    num_whole = 0
    for answer, like in zip(answers, expected, strict=True):
        error = answer.wait().error
        if error is None:
            num_whole += 1
            assert (answer.text, answer.finish_reason) == (like.text, like.finish_reason)
            assert answer.outcome.completion_tokens == like.outcome.completion_tokens
        else:
            assert isinstance(error, Cancelled) or answer.id in broken or device.num_lost
            assert like.text.startswith(answer.text)
    assert num_whole > NUM_ASKED / 3 and device.num_failed and device.sources == {True, False}
    driver.engine._pool.check_integrity()
    assert driver.engine._pool.num_leases == 0 and driver.engine.num_in_flight == 0
    rounds = [threading.Event(), threading.Event()]
    for ended in rounds:
        driver.engine._inbox.put(ended.set)
        assert ended.wait(5)
    assert driver.engine._steps._asked is None, "nothing that questions hold"
