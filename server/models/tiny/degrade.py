"""Training augmentation: what H.264, chroma subsampling and resizing leave of a frame, imitated at model size.

Measured on encoded, decoded and averaged-down videos (CRF 18 to 32, 320x240 to 640x360): luma errs by 1.4 to 2.0 and
chroma by 0.7 to 2.4 levels (RMS, of 255); chroma loses 6 to 21 % of what a 3 x 3 blur takes away, luma about 1 %.
Here: a blend with a blurred copy (stronger for chroma),
smooth and fine noise, and a change of light; all strengths are drawn per frame.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def degrade(frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Frames [n, 3, 64, 96] in 0..1 -> the same shape, quantised to 1/255 and clamped; a tenth stays undamaged.

    Pure tensor operations; with ``generator`` None the global one is used (as torch.compile needs).
    """
    n, _, height, width = frames.shape
    device = frames.device

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    strength = rand(n, 1, 1, 1) * (rand(n, 1, 1, 1) > 0.1)
    to_ycc = torch.tensor(_TO_YCC, device=device, dtype=frames.dtype)
    ycc = torch.einsum("ij,njhw->nihw", to_ycc, frames)
    padded = F.pad(ycc, (1, 1, 1, 1), mode="replicate")
    blurred = F.avg_pool2d(padded, 3, stride=1)
    # Luma keeps its edges better than chroma does.
    softness = strength * torch.cat([0.22 * rand(n, 1, 1, 1), 0.6 * rand(n, 1, 1, 1).expand(-1, 2, -1, -1)], 1)
    ycc = ycc + softness * (blurred - ycc)
    smooth = F.interpolate(rand(n, 3, height // 4, width // 4) - 0.5, scale_factor=4, mode="bilinear")
    ycc = ycc + strength * (
        0.05 * rand(n, 1, 1, 1) * smooth + 0.05 * rand(n, 1, 1, 1) * (rand(n, 3, height, width) - 0.5)
    )
    image = torch.einsum("ij,njhw->nihw", torch.tensor(_TO_RGB, device=device, dtype=frames.dtype), ycc).clamp(0, 1)
    light = rand(n, 3, 1, 1) * 2 - 1
    image = image.clamp(min=1e-4) ** (1 + 0.15 * strength * light[:, 0:1])
    image = (image - 0.5) * (1 + 0.12 * strength * light[:, 1:2]) + 0.5 + 0.04 * strength * light[:, 2:3]
    return (image.clamp(0, 1) * 255).round() / 255
