from __future__ import annotations

import pytest
import torch

from server.models.tiny import world
from server.models.tiny.degrade import degrade
from server.models.tiny.font import GLYPHS, SHAPE_MASKS
from server.models.tiny.render import HEIGHT, WIDTH, object_box, object_mask, plate_corner, render, render_script
from server.models.tiny.world import COLORS, PLATE_COLORS


@pytest.fixture(scope="module")
def script() -> world.Script:
    return world.sample_scripts(1, 4, torch.Generator().manual_seed(11))


@pytest.fixture(scope="module")
def frames(script: world.Script) -> torch.Tensor:
    return render_script(script)[0]


def test_symbols_and_shapes_differ_from_one_another() -> None:
    for bank in (GLYPHS, SHAPE_MASKS):
        flat = bank.flatten(1).float()
        distance = torch.cdist(flat, flat, p=1) + 1000 * torch.eye(len(flat))
        assert distance.min() >= 2


def nearest(color: torch.Tensor, palette: dict[str, tuple[int, int, int]]) -> int:
    shaded = torch.tensor(list(palette.values()))[:, None] / 255 * torch.linspace(0.8, 1, 5)[:, None]
    return int((shaded - color).abs().sum(-1).amin(1).argmin())


def test_objects_and_plates_stand_where_the_script_says(script: world.Script, frames: torch.Tensor) -> None:
    looks = script.looks[0]
    for place in (0, 1):
        left, top = plate_corner(looks, place)
        assert left.min() >= 0 and (left + 38).max() <= WIDTH
        assert top.min() >= 0 and (top + 16).max() <= HEIGHT
        for tick in range(script.num_ticks):
            # The plate's margin left of the first symbol.
            column, row = int(left[tick]) + 1, int(top[tick]) + 4
            color = frames[tick, :, row : row + 8, column].mean(1)
            assert nearest(color, PLATE_COLORS) == script.plates[0, tick, place]


def test_the_object_is_never_hidden_and_has_its_color(script: world.Script, frames: torch.Tensor) -> None:
    looks, objects = script.looks[0], script.objects[0]
    x, y = torch.arange(WIDTH)[None, None] + 0.5, torch.arange(HEIGHT)[None, :, None] + 0.5
    motion = 1.5 * (looks[:, -1] * 2 - 1)
    mask = object_mask(objects, looks, x, y, motion)
    assert (mask.sum((1, 2)) > 100).all()
    assert not mask[:, :, :0].any() and not mask[:, :15].any() and not mask[:, 49:].any()
    center, _, radius = object_box(looks)
    assert (center - radius >= 0).all() and (center + radius <= WIDTH).all()
    for tick in range(script.num_ticks):
        color = frames[tick][:, mask[tick]].median(1).values
        assert nearest(color, COLORS) == objects[tick] // 10


@pytest.mark.parametrize(("width", "height"), [(384, 256), (320, 240), (640, 360)])
def test_a_large_picture_averages_down_to_the_small_one(script: world.Script, width: int, height: int) -> None:
    rows = (script.objects[0, :4], script.codes[0, :4], script.plates[0, :4], script.looks[0, :4])
    large = torch.nn.functional.adaptive_avg_pool2d(render(*rows, width, height, 1), (HEIGHT, WIDTH))
    small = render(*rows, samples=3)
    assert (large - small).abs().mean() < 0.02


def test_the_renderer_is_one_graph_for_compilation(script: world.Script, frames: torch.Tensor) -> None:
    rows = (script.objects[0, :2], script.codes[0, :2], script.plates[0, :2], script.looks[0, :2])
    compiled = torch.compile(lambda *args: degrade(render(*args)), fullgraph=True, dynamic=False, backend="eager")
    assert compiled(*rows).shape == (2, 3, HEIGHT, WIDTH)


def test_degrading_is_mild_bounded_and_repeatable(frames: torch.Tensor) -> None:
    one = degrade(frames, torch.Generator().manual_seed(3))
    assert torch.equal(one, degrade(frames, torch.Generator().manual_seed(3)))
    assert one.min() >= 0 and one.max() <= 1
    assert torch.allclose(one * 255, (one * 255).round(), atol=1e-3)
    error = (one - frames).pow(2).mean((1, 2, 3)).sqrt() * 255
    assert error.max() < 30 and 1 < error.mean() < 12
    assert (error < 0.5).any()
