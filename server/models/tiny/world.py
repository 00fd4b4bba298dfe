"""The synthetic world: what is on screen at each second of a video.

A video of N chunks has ``32 N`` one-second ticks. A *shot* of at most 8 ticks shows one object (colour x shape: the
gist, the same over the shot) and two plates, an upper and a lower one (colour and a 3-character code: the detail,
different at every tick). Within a shot the colours of the upper plate are all different, and so are those of the lower
one: (object, position, plate colour) names one code. In a *static* shot both plates stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (240, 225, 40),
    "green": (30, 165, 50),
    "cyan": (0, 215, 225),
    "blue": (40, 70, 230),
    "purple": (135, 40, 175),
    "pink": (255, 130, 195),
    "white": (245, 245, 245),
    "brown": (125, 70, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart", "moon", "arrow")
PLATE_COLORS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (12, 12, 12),
    "yellow": (235, 215, 30),
    "blue": (30, 60, 210),
    "green": (20, 140, 50),
    "red": (200, 20, 20),
    "purple": (120, 30, 160),
    "orange": (250, 130, 0),
}
SYMBOLS = "23456789ABCDEFGHJKLMNPRSTUVWXYZ"  # no 0 O 1 I Q: too alike
UPPER, LOWER = 0, 1

CHUNK_TICKS = 32
CODE_LENGTH = 3
MAX_SHOT_TICKS = len(PLATE_COLORS)
NUM_OBJECTS = len(COLORS) * len(SHAPES)
MAX_TARGETS, NUM_ABSENT, NUM_COUNTED = 24, 12, 3
MAX_CLOCK_S = 6000
"""99:59 is the last second that can be told."""
FIRST_TRAINING_SEED = 1_000_000
"""Seeds below belong to benchmarks (``make-video``); training takes this one and above."""

FINAL_DURATIONS: Mapping[int, float] = {4: 0.3, 6: 0.2, 8: 0.5}
NUM_SHOT_LOOKS, NUM_TICK_LOOKS = 40, 8
# Which counted object stands in the k-th of its slots: 4, 3 and 2 appearances, never two of one object in a row.
_COUNTED_ORDER = (0, 1, 2, 0, 1, 0, 2, 1, 0)


@dataclass(frozen=True, slots=True)
class Script:
    """What V videos of T ticks show. All tensors on one device; int64 unless said otherwise.

    An object is ``color * 10 + shape``. *Targets* appear in exactly one shot, *absent* objects never, *counted* ones
    in up to four shots that are separated by others; the remaining shots show distractors, which may repeat.
    """

    objects: Tensor  # [V, T]
    codes: Tensor  # [V, T, 2, 3] indices into SYMBOLS; axis 2 is upper, lower
    plates: Tensor  # [V, T, 2] indices into PLATE_COLORS
    starts: Tensor  # [V, T] first tick of the tick's shot
    lengths: Tensor  # [V, T] ticks of the tick's shot
    static: Tensor  # [V, T] bool: plates stay over the shot
    looks: Tensor  # [V, T, 48] float32 in 0..1: layout and background, the first 40 the same over a shot
    targets: Tensor  # [V, MAX_TARGETS]
    target_starts: Tensor  # [V, MAX_TARGETS] first tick; valid below num_targets
    num_targets: Tensor  # [V]
    absent: Tensor  # [V, NUM_ABSENT]
    counted: Tensor  # [V, NUM_COUNTED]
    clock: Tensor  # [V] the time of tick 0 in s

    @property
    def num_ticks(self) -> int:
        return int(self.objects.shape[1])


def object_name(index: int) -> str:
    """``"red star"`` for the object's index."""
    return f"{list(COLORS)[index // len(SHAPES)]} {SHAPES[index % len(SHAPES)]}"


def training_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for training data. Raises ValueError for a seed that belongs to benchmarks."""
    if seed < FIRST_TRAINING_SEED:
        raise ValueError(f"training seeds start at {FIRST_TRAINING_SEED}, got {seed}")
    return torch.Generator(device=device).manual_seed(seed)


def sample_scripts(
    num_videos: int,
    num_chunks: int,
    generator: torch.Generator,
    *,
    durations: Mapping[int, float] = FINAL_DURATIONS,
    p_static: float = 0.15,
    p_late: float = 0.0,
    cut_at_chunks: bool = True,
) -> Script:
    """Draw ``num_videos`` scripts of ``num_chunks`` chunks on the generator's device.

    ``durations`` maps shot lengths in s (1 to 8) to weights; the phase of the first shot is random. A share
    ``p_late`` of the videos starts at any time up to MAX_CLOCK_S, as if cut from a longer one. With ``cut_at_chunks``
    a shot ends at the chunk's border (a shorter one, down to 1 s, may result), so that every target lies in one chunk.
    Raises ValueError for lengths out of range.
    """
    if not durations or not all(1 <= d <= MAX_SHOT_TICKS for d in durations):
        raise ValueError(f"shot lengths must lie in 1..{MAX_SHOT_TICKS} s, got {sorted(durations)}")
    device, ticks = generator.device, num_chunks * CHUNK_TICKS

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    def randint(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator, device=device)

    if cut_at_chunks:
        starts = _shot_starts(num_videos * num_chunks, CHUNK_TICKS, durations, rand).view(num_videos, num_chunks, -1)
        starts = (starts + CHUNK_TICKS * torch.arange(num_chunks, device=device)[:, None]).view(num_videos, ticks)
    else:
        starts = _shot_starts(num_videos, ticks, durations, rand)
    tick = torch.arange(ticks, device=device).expand(num_videos, ticks)
    first = starts == tick
    lengths = torch.zeros_like(starts).scatter_add_(1, starts, torch.ones_like(starts)).gather(1, starts)

    deck = rand(num_videos, NUM_OBJECTS).argsort(stable=True, dim=1)
    targets, absent, counted, distractors = torch.tensor_split(
        deck, (MAX_TARGETS, MAX_TARGETS + NUM_ABSENT, MAX_TARGETS + NUM_ABSENT + NUM_COUNTED), 1
    )
    # Steps that are never 0 modulo the deck keep two neighbouring distractors apart.
    num_distractors = distractors.shape[1]
    steps = (1 + randint(num_distractors - 1, num_videos, ticks)) * first
    shown = distractors.gather(1, steps.cumsum(1) % num_distractors)
    # Shots in random order, those of one tick late: the first become targets, the next hold the counted objects.
    order = (rand(num_videos, ticks) + 2.0 * (lengths == 1) + 4.0 * ~first).argsort(stable=True, dim=1)
    num_shots = first.sum(1)
    slots = max(2, min(MAX_TARGETS, 3 * num_chunks // 2))
    num_targets = num_shots.clamp(max=slots)
    rank = torch.arange(ticks, device=device)
    target_starts = order[:, :MAX_TARGETS]
    if ticks < MAX_TARGETS:
        target_starts = torch.nn.functional.pad(target_starts, (0, MAX_TARGETS - ticks))
    taken = rank[:MAX_TARGETS] < num_targets[:, None]
    shown = _write(shown, target_starts[:, : taken.shape[1]], targets[:, : taken.shape[1]], taken)
    again = order[:, slots : slots + len(_COUNTED_ORDER)]
    again = torch.where(rank[slots : slots + again.shape[1]] < num_shots[:, None], again, ticks).sort(1).values
    which = torch.tensor(_COUNTED_ORDER, device=device)[: again.shape[1]].expand_as(again)
    shown = _write(shown, again, counted.gather(1, which), again < ticks)

    static = (rand(num_videos, ticks) < p_static).gather(1, starts)
    moment = torch.where(static, starts, tick)
    codes = randint(len(SYMBOLS), num_videos, ticks, 2, CODE_LENGTH)
    codes = codes.gather(1, moment[..., None, None].expand_as(codes))
    palettes = rand(num_videos, ticks, 2, len(PLATE_COLORS)).argsort(stable=True, dim=3)
    palettes = palettes.gather(1, starts[..., None, None].expand_as(palettes))
    plates = palettes.gather(3, (moment - starts)[..., None, None].expand(-1, -1, 2, 1))[..., 0]
    shot_looks = rand(num_videos, ticks, NUM_SHOT_LOOKS)
    shot_looks = shot_looks.gather(1, starts[..., None].expand_as(shot_looks))
    looks = torch.cat([shot_looks, rand(num_videos, ticks, NUM_TICK_LOOKS)], 2)
    clock = randint(max(1, MAX_CLOCK_S - ticks), num_videos) * (rand(num_videos) < p_late)
    return Script(
        objects=shown.gather(1, starts),
        codes=codes,
        plates=plates,
        starts=starts,
        lengths=lengths,
        static=static,
        looks=looks,
        targets=targets,
        target_starts=target_starts,
        num_targets=num_targets,
        absent=absent,
        counted=counted,
        clock=clock,
    )


def _shot_starts(rows: int, ticks: int, durations: Mapping[int, float], rand: object) -> Tensor:
    """[rows, ticks]: the first tick of each tick's shot; lengths are independent draws, the first shot's is cut."""
    assert callable(rand)
    draw: Tensor = rand(rows, ticks + 1)
    weights = torch.tensor(list(durations.values()), device=draw.device, dtype=torch.float32).cumsum(0)
    choice = torch.searchsorted(weights / weights[-1], draw, right=True).clamp(max=len(durations) - 1)
    length = torch.tensor(list(durations), device=draw.device)[choice]
    phase = (rand(rows, 1) * length[:, :1]).long()
    ends = length.cumsum(1) - phase
    tick = torch.arange(ticks, device=draw.device).expand(rows, ticks).contiguous()
    shot = torch.searchsorted(ends, tick, right=True)
    return torch.where(shot > 0, ends.gather(1, (shot - 1).clamp(min=0)), 0)


def _write(row: Tensor, at: Tensor, values: Tensor, valid: Tensor) -> Tensor:
    """``row`` [V, T] with ``values`` at columns ``at`` where ``valid``."""
    wide = torch.cat([row, row[:, :1]], 1)
    wide = wide.scatter(1, torch.where(valid, at, row.shape[1]), values)
    return wide[:, :-1]
