"""Trains the bundled model: ``python -m server.models.tiny.train --out FOLDER``, on one CUDA device.

Runs all stages of the recipe; with the same folder again it resumes at the last checkpoint. Every stage writes
``checkpoint.pt``, ``model.safetensors`` (fp16) and ``train.jsonl``: a line per report with the accuracy per question
type, video length and ratio.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from server.models.lm.decoder import DecoderConfig, Layer
from server.models.tiny import tokenizer
from server.models.tiny.auxiliary import ReadingHead, frame_targets, memory_reading, retrieval_loss, retrieval_spans
from server.models.tiny.degrade import degrade
from server.models.tiny.encoder import TinyEncoder
from server.models.tiny.model import TinyModules, read_config
from server.models.tiny.muon import Muon
from server.models.tiny.packed import Layout, Shape, Tables, embed, packed_layer
from server.models.tiny.questions import MAX_ROW, TYPES, QuestionBank, Questions
from server.models.tiny.recipe import LEVELS, STAGES, Recipe, draw_gaps, draw_ratios
from server.models.tiny.render import HEIGHT, WIDTH, render
from server.models.tiny.report import Report
from server.models.tiny.world import CHUNK_TICKS, Script, sample_scripts, training_generator


def initialise(modules: TinyModules) -> None:
    """Small matrices near 1/sqrt(fan-in), output projections smaller; VST projections start as the plain ones."""
    depth = len(modules.decoder.layers)
    for name, parameter in modules.named_parameters():
        if parameter.dim() == 2:
            std = 0.8 / math.sqrt(parameter.shape[1])
            if "embed" in name or "digits" in name:
                std = 0.05
            elif name.endswith(("o_proj.weight", "down_proj.weight", "out.weight", "down.weight")):
                std /= math.sqrt(2 * depth)
            nn.init.normal_(parameter, std=std)
    nn.init.normal_(modules.encoder.position, std=0.02)
    for layer in modules.decoder.layers:
        assert isinstance(layer, Layer)
        attention = layer.self_attn
        for norm in (attention.q_norm, attention.k_norm):
            nn.init.constant_(norm.weight, 1.5)  # type: ignore[arg-type]
        for one in "qkv":
            beacon, plain = getattr(attention, f"beacon_{one}_proj"), getattr(attention, f"{one}_proj")
            beacon.weight.data.copy_(plain.weight.data)


class Trainer:
    """The state of a run: modules, optimisers, curriculum; :meth:`run` goes on to the end or the time limit."""

    def __init__(self, recipe: Recipe, out: Path, device: torch.device) -> None:
        self.recipe, self.out, self.device = recipe, out, device
        torch.manual_seed(recipe.seed)
        self.rng = np.random.default_rng(recipe.seed)
        self.generator = training_generator(recipe.seed, device)
        self.prefix = torch.tensor(
            tokenizer.load().encode(tokenizer.PREFIX, add_special_tokens=False).ids, device=device
        )
        self.shape = Shape(
            num_chunks=recipe.num_chunks,
            chunk_tokens=CHUNK_TICKS * TinyEncoder.TOKENS_PER_FRAME,
            num_rows=2 * recipe.num_chunks,
            row_tokens=MAX_ROW,
            prefix_tokens=len(self.prefix),
            min_ratio=recipe.min_ratio,
        )
        config = DecoderConfig.of(read_config())
        self.rope = config.rope
        self.modules = TinyModules(config)
        initialise(self.modules)
        if recipe.init:
            self.modules.load_state_dict({name: t.float() for name, t in load_file(recipe.init).items()})
        self.modules.to(device)
        self.modules.encoder.convs.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.frame_head = ReadingHead(config.hidden_size * TinyEncoder.TOKENS_PER_FRAME).to(device)
        self.memory_head = ReadingHead(config.hidden_size).to(device)
        matrices: list[nn.Parameter] = []
        self.others = [*self.frame_head.parameters(), *self.memory_head.parameters()]
        for name, parameter in self.modules.named_parameters():
            inner = name.startswith(("decoder.layers", "encoder.blocks", "encoder.projector"))
            (matrices if inner and parameter.dim() == 2 else self.others).append(parameter)
        self.muon = Muon(matrices)
        groups = [
            {"params": [p for p in self.others if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for p in self.others if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=recipe.adam_lr, betas=(0.9, 0.98), fused=device.type == "cuda")
        self.layout = Layout(self.shape, device)
        self._sees = self.layout.mask()
        self.bank = QuestionBank(recipe.phrasings, recipe.seed, device)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.step, self.level, self.level_start, self.ema, self.num_ema = 0, recipe.level, 0, 0.0, 0
        self.report = Report()
        self._encode, self._layer, self._draw = self._encode_now, self._layer_now, self._draw_now
        self._read, self._keep, self._retrieve = self.frame_head.forward, memory_reading, retrieval_loss
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            torch._dynamo.config.recompile_limit = 32
            self._encode = torch.compile(self._encode_now, dynamic=False)
            self._layer = torch.compile(self._layer_now, dynamic=False)
            self._draw = torch.compile(self._draw_now, dynamic=False)
            self._read = torch.compile(self._read, dynamic=False)
            self._keep = torch.compile(self._keep, dynamic=False)
            self._retrieve = torch.compile(self._retrieve, dynamic=False)
            self._block_mask = torch.compile(create_block_mask)

    def _draw_now(self, script: Script) -> Tensor:
        codes, plates, looks = script.codes.flatten(0, 1), script.plates.flatten(0, 1), script.looks.flatten(0, 1)
        # One sample a pixel at twice the size, averaged: a quarter of the graph of four samples a pixel.
        large = render(script.objects.flatten(), codes, plates, looks, width=2 * WIDTH, height=2 * HEIGHT, samples=1)
        frames = degrade(functional.avg_pool2d(large, 2))
        return frames.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def _encode_now(self, frames: Tensor, seconds: Tensor) -> Tensor:
        encoder = self.modules.encoder
        return encoder.tokens(encoder.cells(frames), seconds)

    def _layer_now(self, layer: Layer, x: Tensor, tables: Tables, index: Tensor, mask: Any) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.device.type == "cuda":
                out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
                assert isinstance(out, Tensor)
                return out
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

        vsts = (self.shape.num_visual, self.shape.rows_start)
        return packed_layer(layer, x, tables, index, vsts, self.rope, attend)

    def _mask(self) -> Any:
        if self.device.type != "cuda":
            return self.layout.dense()
        return self._block_mask(
            self._sees, None, None, self.shape.num_queries, self.shape.num_keys, device=self.device
        )  # fmt: skip

    def _ask(self, script: Script, chunks: int) -> tuple[Questions, Tensor, Tensor]:
        """Questions of all videos as rows of packed sequences [batch, rows, ...], and where their answers are."""
        batch, shape = self.recipe.batch, self.shape
        per_sequence = shape.num_chunks // chunks
        rows = shape.num_rows // per_sequence
        # The last row of every sequence is asked without a video.
        blind = torch.zeros(batch, shape.num_rows, dtype=torch.bool, device=self.device)
        blind[:, -1] = True
        asked = self.bank.sample(
            script, rows, self.generator, self.recipe.mix, blind.view(-1, rows), self.recipe.p_dialogue
        )
        first = torch.arange(per_sequence, device=self.device).repeat(batch) * chunks * shape.chunk_tokens
        spans = []
        for span in retrieval_spans(script, asked, chunks):
            moved = torch.where(span[..., 1:] > 0, span + first[:, None, None, None], 0)
            spans.append(moved.view(batch, shape.num_rows, -1, 2))
        ids, answer, types = (
            t.view(batch, shape.num_rows, *t.shape[2:]) for t in (asked.ids, asked.answer, asked.types)
        )
        types = torch.where(blind, len(TYPES), types)
        return replace(asked, ids=ids, answer=answer, types=types), spans[0], spans[1]

    def train_step(self) -> None:
        """One step: new videos, their questions, forward, backward, both optimisers."""
        recipe, level, shape, device = self.recipe, LEVELS[self.level], self.shape, self.device
        lengths = {chunks: share for chunks, share in level.chunks.items() if chunks <= shape.num_chunks}
        share = np.array(list(lengths.values()))
        chunks = int(self.rng.choice(list(lengths), p=share / share.sum()))
        ratios = draw_ratios(self.rng, recipe, level, shape)
        self.layout.arrange(chunks, ratios, num_blind=1, gaps=draw_gaps(self.rng, recipe, shape))
        mask = self._mask()
        with torch.no_grad():
            videos = recipe.batch * shape.num_chunks // chunks
            script = sample_scripts(
                videos,
                chunks,
                self.generator,
                durations=level.durations,
                p_static=level.p_static,
                p_late=recipe.p_late,
            )
            asked, chunk_spans, moment_spans = self._ask(script, chunks)
            frames = self._draw(script)
            seconds = (torch.arange(script.num_ticks, device=device) + script.clock[:, None]).flatten()
            targets = frame_targets(script)
        losses: dict[str, Tensor] = {}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            tokens = self._encode(frames, seconds)
            losses["reading"], losses["read"] = self._read(tokens.flatten(1), targets.flatten(0, 1))
            visual = tokens.reshape(recipe.batch, shape.num_visual, -1).to(self.dtype)
            x = embed(self.modules.decoder, shape, visual, asked.ids.flatten(1), self.prefix)
            tables = Tables.of(self.layout, self.rope, self.dtype)
            for index, layer in enumerate(self.modules.decoder.layers):
                assert isinstance(layer, Layer)
                if index == recipe.auxiliary_layer:
                    known = targets.view(recipe.batch, -1, targets.shape[-1])
                    losses["keeping"], losses["kept"] = self._keep(self.memory_head, self.layout, x, known)
                    if 1 not in ratios:
                        spans = (chunk_spans, moment_spans)
                        losses["to_chunk"], losses["to_moment"] = self._retrieve(
                            layer, x, self.layout, tables, self.rope, asked.answer, asked.types, *spans
                        )
                x = self._layer(layer, x, tables, self.layout.memory_index, mask)
            text = x[:, shape.rows_start : shape.prefix_start].reshape(
                recipe.batch, shape.num_rows, shape.row_tokens, -1
            )
            logits = self.modules.decoder.logits(text)[:, :, :-1]
        goal, learn = asked.ids[:, :, 1:], asked.answer[:, :, 1:]
        entropy = functional.cross_entropy(logits.flatten(0, 2), goal.flatten(), reduction="none").view(goal.shape)
        losses["answer"] = (entropy * learn).sum() / learn.sum()
        fade = max(0.1, 1 - self.step / recipe.steps / recipe.fade)
        loss = losses["answer"] + recipe.reading_weight * fade * (losses["reading"] + losses["keeping"])
        if "to_chunk" in losses:
            loss = loss + recipe.retrieval_weight * (losses["to_chunk"] + fade * losses["to_moment"])
        torch.autograd.backward(loss)
        self._update()
        with torch.no_grad():
            right = ((logits.argmax(-1) == goal) | ~learn).all(-1)
            codes = asked.types == TYPES.index("code")
            self._climb(ratios, (right & codes).sum() / codes.sum().clamp(min=1))
            if self.step % 4 == 0:
                uniform = ratios[0] if len(set(ratios)) == 1 else 0
                self.report.add(chunks, uniform, asked.types, right)
                self.report.mean(losses)

    def _update(self) -> None:
        recipe = self.recipe
        progress = self.step / recipe.steps
        scale = min(1.0, (self.step + 1) / recipe.warmup)
        if progress > recipe.hold:
            scale *= max(0.01, 0.5 * (1 + math.cos(math.pi * (progress - recipe.hold) / (1 - recipe.hold))))
        nn.utils.clip_grad_norm_(self.others, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = recipe.adam_lr * scale
        self.adam.step()
        self.muon.step(recipe.muon_lr * scale)
        self.modules.zero_grad(set_to_none=True)
        self.frame_head.zero_grad(set_to_none=True)
        self.memory_head.zero_grad(set_to_none=True)
        self.step += 1

    def _climb(self, ratios: list[int], accuracy: Tensor) -> None:
        """To the next level once codes are read at gentle ratios: only these show whether reading works."""
        if max(ratios) > 4:
            return
        self.ema, self.num_ema = 0.9 * self.ema + 0.1 * float(accuracy), self.num_ema + 1
        level = LEVELS[self.level]
        if (self.num_ema > 15 and self.ema > level.gate) or self.step - self.level_start > level.longest:
            self.report.write(self.out, {"step": self.step, "level": self.level + 1, "ema": round(self.ema, 3)})
            self.level, self.level_start, self.ema, self.num_ema = self.level + 1, self.step, 0.0, 0

    def run(self, minutes: float, fit: bool) -> bool:
        """Trains until the recipe ends (True) or ``minutes`` are over (False), saving every other minute.

        With ``fit`` the number of steps is chosen, and corrected on the way, so that the recipe ends in ``minutes``.
        """
        start = reported = saved = timed = time.monotonic()
        first = self.step
        while self.step < self.recipe.steps:
            self.train_step()
            now = time.monotonic()
            if fit and self.step == first + 20:
                timed = now
            if self.step in (1, 10) or now - reported > 15:
                head = {"step": self.step, "level": self.level, "s": round(now - start), "ema": round(self.ema, 3)}
                self.report.write(self.out, head | {"steps": self.recipe.steps} | self.report.summary())
                reported = now
                if fit and self.step > first + 100:
                    left_s = 60 * minutes - (now - start) - 10
                    steps = self.step + int(left_s / (now - timed) * (self.step - first - 20))
                    self.recipe = replace(self.recipe, steps=max(steps, self.step))
            if now - saved > 120:
                self.save()
                saved = now
            if now - start > 60 * minutes:
                break
        self.save()
        return self.step >= self.recipe.steps

    def save(self) -> None:
        """The checkpoint to resume from, and the fp16 weights."""
        state = {
            "modules": self.modules.state_dict(),
            "heads": [self.frame_head.state_dict(), self.memory_head.state_dict()],
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "generator": self.generator.get_state(),
            "rng": self.rng.bit_generator.state,
            "progress": (self.recipe.steps, self.step, self.level, self.level_start, self.ema, self.num_ema),
        }
        partial = self.out / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self.out / "checkpoint.pt")
        weights = {
            name: tensor.detach().half().cpu().contiguous() for name, tensor in self.modules.state_dict().items()
        }
        save_file(weights, self.out / "model.safetensors")

    def resume(self) -> None:
        """Goes back to the last checkpoint in the run's folder."""
        state = torch.load(self.out / "checkpoint.pt", map_location=self.device, weights_only=False)
        self.modules.load_state_dict(state["modules"])
        self.frame_head.load_state_dict(state["heads"][0])
        self.memory_head.load_state_dict(state["heads"][1])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.generator.set_state(state["generator"].cpu())
        self.rng.bit_generator.state = state["rng"]
        steps, self.step, self.level, self.level_start, self.ema, self.num_ema = state["progress"]
        self.recipe = replace(self.recipe, steps=steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; resumed where it holds checkpoints")
    parser.add_argument("--stage", choices=STAGES, help="this stage alone")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop (resumable) each stage after this long")
    parser.add_argument("--fit", action="store_true", help="choose the number of steps that fills --minutes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a field of the recipes"
    )
    options = parser.parse_args()
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.exit(
            1, f"{parser.prog}: training needs a GPU with CUDA, and there is none (--device {options.device})\n"
        )
    changes = {name: json.loads(value) for name, value in (item.split("=", 1) for item in options.set)}
    init = ""
    for name in [options.stage] if options.stage else STAGES:
        out = options.out / name
        out.mkdir(parents=True, exist_ok=True)
        recipe = replace(STAGES[name], **({"init": init} | changes))
        trainer = Trainer(recipe, out, torch.device(options.device))
        if (out / "checkpoint.pt").exists():
            trainer.resume()
        done = trainer.run(options.minutes, options.fit)
        trainer.report.write(out, {"done": done, "step": trainer.step})
        if not done:
            break
        init = str(out / "model.safetensors")


if __name__ == "__main__":
    main()
