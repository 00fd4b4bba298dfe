"""The training script runs, saves, resumes and replays; what it makes can be served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from server.models.tiny.recipe import LEVELS, STAGES, Recipe, draw_ratios
from server.models.tiny.train import Trainer, main

SMALL = Recipe(steps=2, batch=1, num_chunks=1, phrasings=10)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.modules.state_dict().items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = Trainer(SMALL, tmp_path_factory.mktemp("whole"), torch.device("cpu"))
    assert trainer.run(minutes=60, fit=False)
    return trainer


def test_a_run_changes_every_weight_and_writes_its_log(whole: Trainer) -> None:
    fresh = Trainer(SMALL, whole.out, torch.device("cpu"))
    before = weights(fresh)
    same = [name for name, tensor in weights(whole).items() if torch.equal(tensor, before[name])]
    assert same == []
    lines = [json.loads(line) for line in (whole.out / "train.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 1


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(whole: Trainer, tmp_path: Path) -> None:
    first = Trainer(SMALL, tmp_path, torch.device("cpu"))
    first.train_step()
    first.save()
    second = Trainer(SMALL, tmp_path, torch.device("cpu"))
    second.resume()
    # The degradation of frames draws from torch's global generator, which a checkpoint does not hold.
    assert second.step == 1
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(second).values(), strict=True))
    assert second.run(minutes=60, fit=False)


def test_ratios_always_fit_the_packed_sequence(whole: Trainer) -> None:
    for level in LEVELS:
        for _ in range(300):
            ratios = draw_ratios(whole.rng, STAGES["1-codes"], level, whole.shape)
            assert sum(whole.shape.chunk_tokens // ratio for ratio in ratios) <= whole.shape.memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        main()
    assert "CUDA" in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
