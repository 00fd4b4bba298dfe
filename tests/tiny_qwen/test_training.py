"""What training computes is what serving computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_qwen import model as tiny
from tiny_qwen.sequence import CHUNK_TOKENS
from tiny_qwen.train import Recipe, Trainer

from compression.mixed import MixedCache
from server.models.families.one_pass import OnePassModel
from server.models.lm.decoder import Window
from server.models.registry import load_model
from server.models.tiny.world import sample_scripts, training_generator
from server.video.frames import Frames


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    recipe = Recipe(batch=1, num_chunks=2, num_rows=4, phrasings=3, level=0)
    return Trainer(recipe, tmp_path_factory.mktemp("run"), torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(trainer: Trainer) -> Path:
    tiny.save(trainer.model, trainer.out / "model")
    return trainer.out / "model"


def frames_of(patches: torch.Tensor) -> torch.Tensor:
    """The pixels [T, 3, h, w] uint8 that flat patches were made of."""
    rows, columns, merge, side = tiny.HEIGHT // 24, tiny.WIDTH // 24, tiny.MERGE, tiny.PATCH
    parts = patches.view(-1, rows, columns, merge, merge, 3, side, side).permute(0, 5, 1, 3, 6, 2, 4, 7)
    normal = parts.reshape(-1, 3, tiny.HEIGHT, tiny.WIDTH)
    mean, std = (torch.tensor(each)[:, None, None] for each in (tiny.PATCHES.mean, tiny.PATCHES.std))
    return ((normal * std + mean) * 255).round().to(torch.uint8)


def test_the_tower_sees_what_transformers_own_pass_sees(trainer: Trainer) -> None:
    patches = torch.randn(5 * 48, 3 * tiny.PATCH**2)
    visual = trainer.model.model.visual
    with torch.no_grad():
        theirs = visual(patches, grid_thw=torch.tensor([[5, 6, 8]])).pooler_output
        torch.testing.assert_close(trainer.sight.tokens(patches).flatten(0, 1), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("video_chunks", [1, 2])
def test_serving_computes_the_logits_of_training(trainer: Trainer, folder: Path, video_chunks: int) -> None:
    model: Any = load_model(str(folder), device="cpu", low_ratio=1)
    assert isinstance(model, OnePassModel)
    trainer.layout.arrange(video_chunks)
    script = sample_scripts(2 // video_chunks, video_chunks, training_generator(1_000_001))
    half = {name: tensor.half().float() for name, tensor in trainer.model.state_dict().items()}
    own = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.model.load_state_dict(half)
    with torch.no_grad():
        patches = trainer.patches(script)
        asked, _, _ = trainer._ask(script, video_chunks)
        visual = trainer.sight.tokens(patches).view(1, -1, 256)
        states = trainer.hidden(visual, asked.ids)
        logits = trainer.logits(states[-1])[0]
    trainer.model.load_state_dict(own)
    pixels = frames_of(patches)
    for row in range(trainer.shape.num_rows - 1):
        size = CHUNK_TOKENS // tiny.TOKENS_PER_FRAME
        video = row // (trainer.shape.num_rows * video_chunks // 2)
        run, low = model.prefill(), []
        for chunk in range(video_chunks):
            start = (video * video_chunks + chunk) * size
            part = pixels[start : start + size].permute(0, 2, 3, 1).contiguous().numpy()
            frames = Frames(part, torch.arange(chunk * size, (chunk + 1) * size).double().numpy())
            features = model.encode(model.preprocess(frames), frames.times_s)
            low.append(run.append(features, last=chunk == video_chunks - 1)[0])
        cache = MixedCache(model.prefix(), low, model.rope, room=64)
        # What stands around a video is the row's and the prefix's in training, the chunks' in serving.
        ids = asked.ids[0, row, len(trainer.before) :]
        with torch.inference_mode():
            hidden, _ = model.decoder([Window(model.decoder.embed_tokens(ids), cache)])
            served = model.decoder.logits(hidden)
        torch.testing.assert_close(logits[row, len(trainer.before) :], served, atol=1e-4, rtol=1e-4)
