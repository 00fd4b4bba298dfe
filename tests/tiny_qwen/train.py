"""Trains the tiny Qwen2.5-VL: ``PYTHONPATH=.:tests python -m tiny_qwen.train --out FOLDER --minutes 10``.

One CUDA device. Plain causal training over uncompressed visual tokens: no token of a video is ever compressed, unless
``--drop`` asks for it. The folder holds ``train.jsonl`` (a line a report) and ``model`` (saved every minute, as
transformers loads it).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_qwen import model as tiny
from tiny_qwen.model import TOKENS_PER_FRAME
from tiny_qwen.retrieval import clock_classifier, digits, gist_classifier, retrieval_loss, spelling
from tiny_qwen.sequence import CHUNK_TOKENS, Layout, Shape
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import Qwen2_5_VLForConditionalGeneration

from server.models.families.decoder import TransformersDecoder, TransformersLayer, read_rope
from server.models.tiny.auxiliary import ReadingHead, frame_targets, retrieval_spans
from server.models.tiny.degrade import degrade
from server.models.tiny.encoder import TinyEncoder
from server.models.tiny.muon import Muon
from server.models.tiny.questions import MAX_TURN, TYPES, QuestionBank, Questions
from server.models.tiny.recipe import LEVELS, Level
from server.models.tiny.render import render
from server.models.tiny.report import Report
from server.models.tiny.tokenizer import ASSISTANT
from server.models.tiny.tokenizer import END as BUNDLED_END
from server.models.tiny.world import Script, sample_scripts, training_generator

MIX: Mapping[str, float] = {
    "code": 0.36, "exist": 0.09, "order": 0.12, "count": 0.08, "time": 0.11, "object": 0.10, "multi": 0.10,
    "refuse": 0.03, "greeting": 0.01,
}  # fmt: skip
READING, LAST_LEVEL = -1, 2
"""Levels: first the tower alone learns to read frames, then those of the bundled model's recipe up to 16 chunks."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that a run depends on besides the code and the time that it has."""

    batch: int = 6
    num_chunks: int = 16
    num_rows: int = 48
    seed: int = 1_000_101
    muon_lr: float = 3e-3
    adam_lr: float = 1.5e-3
    warmup: int = 100
    hold: float = 0.55
    """Share of the time at the full learning rate; a cosine follows."""
    reading_weight: float = 0.3
    retrieval_weight: float = 0.3
    clock_weight: float = 0.15
    fade: float = 0.7
    """Share of the time after which the auxiliary losses are down to a tenth; the one towards the chunk stays."""
    reads: float = 0.9
    """Characters read off frames that end the level of reading."""
    longest_reading: int = 2500
    drop: float = 0.0
    """Share of steps in which the questions see a part of every chunk only, as if it were compressed by chance."""
    phrasings: int = 600
    level: int = READING
    init: str = ""
    mix: Mapping[str, float] = field(default_factory=lambda: dict(MIX))


class Trainer:
    """The state of a run; :meth:`run` goes on until the time is over."""

    def __init__(self, recipe: Recipe, out: Path, device: torch.device) -> None:
        self.recipe, self.out, self.device = recipe, out, device
        torch.manual_seed(recipe.seed)
        self.rng = np.random.default_rng(recipe.seed)
        self.generator = training_generator(recipe.seed, device)
        self.tokenizer = tiny.make_tokenizer()
        if recipe.init:
            self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(recipe.init, dtype=torch.float32)
        else:
            self.model = tiny.make_model()
        self.model.to(device).train()
        inner = self.model.model
        self.decoder = TransformersDecoder(
            inner.language_model, self.model.lm_head, read_rope(self.model.config.text_config)
        )
        self.sight = tiny.Sight(inner.visual, device)
        hidden = self.model.config.text_config.hidden_size
        self.prefix = self._ids(tiny.PREFIX)
        self.before, self.between = self._ids(tiny.BEHIND_VIDEO), self._ids(tiny.BEHIND_QUESTION)
        row_tokens = -(-(MAX_TURN + len(self.before) + len(self.between) - 1) // 8) * 8
        self.shape = Shape(recipe.num_chunks, recipe.num_rows, row_tokens, len(self.prefix))
        self.layout = Layout(self.shape, device)
        self._visible = self.layout.mask()
        self.heads = nn.ModuleDict(
            {"reading": ReadingHead(hidden), "gist": gist_classifier(hidden), "clock": clock_classifier(hidden)}
        ).to(device)
        matrices: list[nn.Parameter] = []
        self.others = list(self.heads.parameters())
        for name, parameter in self.model.named_parameters():
            inner_matrix = parameter.dim() == 2 and "embed_tokens" not in name and "lm_head" not in name
            (matrices if inner_matrix else self.others).append(parameter)
        self.muon = Muon(matrices)
        groups = [
            {"params": [p for p in self.others if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for p in self.others if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=recipe.adam_lr, betas=(0.9, 0.98), fused=device.type == "cuda")
        self.bank = QuestionBank(recipe.phrasings, recipe.seed, device)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        # Frames are drawn at twice the size and made smaller with the filter that serving has.
        self.shrink = tuple(
            functional.interpolate(torch.eye(2 * n)[None, None], (n, 2 * n), mode="bicubic", antialias=True)[0, 0].to(
                device
            )
            for n in (tiny.HEIGHT, tiny.WIDTH)
        )
        self.spelt = spelling(device)
        self.step, self.level, self.level_start, self.ema, self.num_ema = 0, recipe.level, 0, 0.0, 0
        self.report = Report()
        self._draw, self._see, self._layer, self._retrieve = (
            self._draw_now,
            self.sight.tokens,
            self._layer_now,
            retrieval_loss,
        )
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            torch._dynamo.config.recompile_limit = 64
            for name in ("_draw", "_see", "_layer", "_retrieve"):
                setattr(self, name, torch.compile(getattr(self, name), dynamic=False))
            # Not compiled: ptxas takes many minutes over the sort in it.
            self._block_mask = create_block_mask

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False), device=self.device)

    def _draw_now(self, objects: Tensor, codes: Tensor, plates: Tensor, looks: Tensor) -> Tensor:
        """Ticks as the server's preprocessing leaves them: uint8 [n, 3, 72, 96]."""
        large = render(objects, codes, plates, looks, width=2 * tiny.WIDTH, height=2 * tiny.HEIGHT, samples=1)
        rows, columns = self.shrink
        return (degrade((rows @ large @ columns.T).clamp(0, 1)) * 255).round().to(torch.uint8)

    def patches(self, script: Script) -> Tensor:
        """The tower's input: [ticks * 48, 432]."""
        # Flat, because their number is always the same: one compiled function draws videos of any length.
        seen = script.objects, script.codes, script.plates, script.looks
        return tiny.PATCHES.flatten(self._draw(*(part.flatten(0, 1) for part in seen)))[0].to(self.dtype)

    def _layer_now(self, layer: TransformersLayer, x: Tensor, cos: Tensor, sin: Tensor, mask: Any) -> Tensor:
        rope = self.decoder.rope
        q, k, v = layer.project(x, None)
        q, k = rope.rotate(q, cos, sin).to(v.dtype), rope.rotate(k, cos, sin).to(v.dtype)
        if self.device.type == "cuda":
            attended = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        else:
            attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return layer.output(x, attended)

    def mask(self) -> Any:
        """Of the layout as it stands."""
        if self.device.type != "cuda":
            return self.layout.dense()
        n = self.shape.num_tokens
        return self._block_mask(self._visible, None, None, n, n, device=self.device)

    def rows(self, ids: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        """The bundled model's rows [V, R, MAX_ROW] in Qwen's words: [V, R, row_tokens] each."""
        bundled = self.tokenizer.convert_tokens_to_ids
        size, (before, between) = self.shape.row_tokens, (len(self.before), len(self.between))
        ids, answer = ids[..., :MAX_TURN], answer[..., :MAX_TURN]
        ids = torch.where(ids == bundled(BUNDLED_END), bundled(tiny.END), ids)
        asked = (ids == bundled(ASSISTANT)).long().argmax(-1, keepdim=True) + before  # where ``between`` begins
        at = torch.arange(size, device=ids.device).expand(*ids.shape[:-1], size)
        shift = torch.where(at >= asked + between, before + between - 1, before)
        source = (at - shift).clamp(0, MAX_TURN - 1)
        there = at - shift < MAX_TURN
        wide = torch.where(there, ids.gather(-1, source), bundled("<pad>"))
        wide = torch.where(at < before, self.before[at.clamp(max=before - 1)], wide)
        inside = (at >= asked) & (at < asked + between)
        wide = torch.where(inside, self.between[(at - asked).clamp(0, between - 1)], wide)
        learn = answer.gather(-1, source) & there & ~inside & (at >= before)
        return wide, learn

    def _ask(self, script: Script, chunks: int) -> tuple[Questions, Tensor, Tensor]:
        """Questions of all videos as rows of sequences [batch, rows, ...], and where their answers are."""
        batch, shape = self.recipe.batch, self.shape
        per_sequence = shape.num_chunks // chunks
        rows = shape.num_rows // per_sequence
        blind = torch.zeros(batch, shape.num_rows, dtype=torch.bool, device=self.device)
        blind[:, -1] = True
        asked = self.bank.sample(script, rows, self.generator, self.recipe.mix, blind.view(-1, rows))
        first = torch.arange(per_sequence, device=self.device).repeat(batch) * chunks * CHUNK_TOKENS
        finer = TOKENS_PER_FRAME // TinyEncoder.TOKENS_PER_FRAME
        chunk, moment = (finer * span for span in retrieval_spans(script, asked, chunks))
        # A time is read off the frame in which the object appears.
        appears = torch.isin(asked.types, torch.tensor([TYPES.index("time"), TYPES.index("order")], device=self.device))
        end = torch.minimum(moment[..., 1], moment[..., 0] + TOKENS_PER_FRAME)
        moment = torch.stack([moment[..., 0], torch.where(appears[..., None], end, moment[..., 1])], -1)
        spans = []
        for span in (chunk, moment):
            moved = torch.where(span[..., 1:] > 0, span + first[:, None, None, None], 0)
            spans.append(moved.view(batch, shape.num_rows, -1, 2))
        ids, answer = self.rows(asked.ids, asked.answer)
        ids, answer, types = (t.view(batch, shape.num_rows, *t.shape[2:]) for t in (ids, answer, asked.types))
        types = torch.where(blind, len(TYPES), types)
        return replace(asked, ids=ids, answer=answer, types=types), spans[0], spans[1]

    def _script(self, level: Level) -> tuple[Script, int]:
        most = self.shape.num_chunks
        lengths = {chunks: share for chunks, share in level.chunks.items() if chunks <= most} or {most: 1.0}
        share = np.array(list(lengths.values()))
        chunks = int(self.rng.choice(list(lengths), p=share / share.sum()))
        videos = self.recipe.batch * self.shape.num_chunks // chunks
        return sample_scripts(
            videos, chunks, self.generator, durations=level.durations, p_static=level.p_static
        ), chunks

    def _drop(self) -> None:
        """Hides visual tokens from the questions, in some steps: every chunk at a ratio of its own."""
        visual = self.layout.kept[: self.shape.num_visual].view(self.shape.num_chunks, -1)
        visual.fill_(True)
        if self.rng.random() < self.recipe.drop:
            ratios = torch.tensor(self.rng.choice([1, 2, 4, 8, 16], (len(visual), 1)), device=self.device)
            visual.copy_(torch.rand(visual.shape, device=self.device) < 1 / ratios)

    def hidden(self, visual: Tensor, ids: Tensor) -> list[Tensor]:
        """``visual`` [B, num_visual, hidden], ``ids`` [B, rows, row_tokens] -> what enters every layer, and comes
        out of the last, [B, num_tokens, hidden] each."""
        embed = self.decoder.embed_tokens
        parts = [
            visual,
            embed(ids.flatten(1)).to(visual.dtype),
            embed(self.prefix).to(visual.dtype).expand(len(ids), -1, -1),
        ]
        padding = self.shape.num_tokens - sum(part.shape[1] for part in parts)
        x = torch.cat([*parts, visual.new_zeros(len(ids), padding, visual.shape[-1])], 1)
        states, (cos, sin), mask = [x], self.tables(), self.mask()
        for layer in self.decoder.layers:
            states.append(self._layer(layer, states[-1], cos, sin, mask))
        return states

    def tables(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the layout as it stands."""
        return self.decoder.rope.tables(self.layout.positions, self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """Of the rows: [B, rows, row_tokens, vocabulary]."""
        shape = self.shape
        return self.decoder.logits(x[:, shape.rows_start : shape.prefix_start]).unflatten(1, (shape.num_rows, -1))

    def train_step(self, progress: float) -> None:
        """One step: new videos, their questions, forward, backward, both optimisers; ``progress`` from 0 to 1."""
        recipe, device = self.recipe, self.device
        level = LEVELS[max(self.level, 0)]
        with torch.no_grad():
            script, chunks = self._script(level)
            patches = self.patches(script)
            targets = frame_targets(script).flatten(0, 1)
        losses: dict[str, Tensor] = {}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            tokens = self._see(patches)
            losses["reading"], losses["read"] = self.heads["reading"](tokens.mean(1), targets)
            each = targets[:, None, :4].expand(-1, TOKENS_PER_FRAME, -1).flatten(0, 1)
            losses["gist"] = self.heads["gist"](tokens.flatten(0, 1), each)
            fade = max(0.1, 1 - progress / recipe.fade) if self.level > READING else 1.0
            loss = recipe.reading_weight * fade * (losses["reading"] + losses["gist"])
            if self.level > READING:
                answered, right, types = self._answer(script, chunks, tokens, losses)
                loss = loss + answered + recipe.clock_weight * fade * losses["clock"]
                loss = loss + recipe.retrieval_weight * (losses["to_chunk"] + fade * losses["to_moment"])
        torch.autograd.backward(loss)
        self._update(progress)
        with torch.no_grad():
            if self.level == READING:
                self._climb(losses["read"], recipe.reads, recipe.longest_reading)
            else:
                codes = types == TYPES.index("code")
                self._climb((right & codes).sum() / codes.sum().clamp(min=1), level.gate, level.longest)
            if self.step % 4 == 0:
                self.report.mean(losses)
                if self.level > READING and "answer" in losses:
                    self.report.add(chunks, 1, types, right)

    def _answer(
        self, script: Script, chunks: int, tokens: Tensor, losses: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of the answers, which of them are right and their types [B, rows]; adds to ``losses``."""
        recipe, layout = self.recipe, self.layout
        layout.arrange(chunks)
        self._drop()
        with torch.no_grad():
            asked, chunk_spans, moment_spans = self._ask(script, chunks)
        visual = tokens.reshape(recipe.batch, self.shape.num_visual, -1).to(self.dtype)
        states = self.hidden(visual, asked.ids)
        inside = states[tiny.AUXILIARY_LAYER]
        seconds = torch.arange(script.num_ticks, device=self.device).expand(len(script.objects), -1)
        clock = digits(seconds.reshape(recipe.batch, -1).repeat_interleave(TOKENS_PER_FRAME, 1).flatten())
        losses["clock"] = self.heads["clock"](inside[:, : self.shape.num_visual].flatten(0, 1), clock)
        losses["to_chunk"], losses["to_moment"] = self._retrieve(
            self.decoder.layers[tiny.AUXILIARY_LAYER], inside, layout, self.tables(), self.decoder.rope, asked.answer,
            asked.types, chunk_spans, moment_spans, self.spelt,
        )  # fmt: skip
        logits = self.logits(states[-1])[:, :, :-1]
        goal, learn = asked.ids[:, :, 1:], asked.answer[:, :, 1:]
        entropy = functional.cross_entropy(logits.flatten(0, 2), goal.flatten(), reduction="none").view(goal.shape)
        losses["answer"] = (entropy * learn).sum() / learn.sum()
        return losses["answer"], ((logits.argmax(-1) == goal) | ~learn).all(-1), asked.types

    def _update(self, progress: float) -> None:
        recipe = self.recipe
        scale = min(1.0, (self.step + 1) / recipe.warmup)
        if progress > recipe.hold:
            scale *= max(0.01, 0.5 * (1 + math.cos(math.pi * (progress - recipe.hold) / (1 - recipe.hold))))
        nn.utils.clip_grad_norm_(self.others, 1.0)
        for parameter in self.model.parameters():  # reading alone leaves the language model without any
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for group in self.adam.param_groups:
            group["lr"] = recipe.adam_lr * scale
        self.adam.step()
        self.muon.step(recipe.muon_lr * scale)
        self.model.zero_grad(set_to_none=True)
        self.heads.zero_grad(set_to_none=True)
        self.step += 1

    def _climb(self, accuracy: Tensor, gate: float, longest: int) -> None:
        """To the next level once this one is mastered, or has taken long enough."""
        if self.level == LAST_LEVEL:
            return
        self.ema, self.num_ema = 0.9 * self.ema + 0.1 * float(accuracy), self.num_ema + 1
        if (self.num_ema > 15 and self.ema > gate) or self.step - self.level_start > longest:
            self.report.write(self.out, {"step": self.step, "level": self.level + 1, "ema": round(self.ema, 3)})
            self.level, self.level_start, self.ema, self.num_ema = self.level + 1, self.step, 0.0, 0

    def run(self, minutes: float) -> None:
        """Trains until ``minutes`` are over, saving every minute."""
        start = reported = saved = time.monotonic()
        while (now := time.monotonic()) - start < 60 * minutes:
            self.train_step((now - start) / (60 * minutes))
            now = time.monotonic()
            if self.step in (1, 10, 100) or now - reported > 15:
                head = {"step": self.step, "level": self.level, "s": round(now - start), "ema": round(self.ema, 3)}
                self.report.write(self.out, head | self.report.summary())
                reported = now
            if now - saved > 60:
                tiny.save(self.model, self.out / "model")
                saved = now
        tiny.save(self.model, self.out / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--drop", type=float, default=0.0, help="share of steps with tokens hidden from the questions")
    parser.add_argument("--init", default="", help="a saved model to go on from")
    parser.add_argument("--level", type=int, default=READING, help="of the curriculum, to begin with")
    parser.add_argument("--batch", type=int, default=Recipe().batch)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(batch=options.batch, drop=options.drop, init=options.init, level=options.level)
    Trainer(recipe, options.out, torch.device(options.device)).run(options.minutes)


if __name__ == "__main__":
    main()
