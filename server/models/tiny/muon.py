"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) over many small matrices at once.

torch.optim.Muon orthogonalises one matrix after the other: some thousand kernel launches a step for this model. Here
matrices of one shape are stacked, so a step costs a few dozen.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration: [n, rows, columns] -> the same shape, singular values near 1."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    out: Tensor = (x.mT if tall else x).to(matrices.dtype)
    return out


class Muon:
    """Momentum SGD whose update is made orthogonal; scaled to the size of an AdamW update."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, momentum: float = 0.95, weight_decay: float = 0.02
    ) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self._groups: dict[tuple[int, ...], list[Tensor]] = {}
        for parameter in parameters:
            self._groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self._buffers = {
            shape: torch.zeros((len(group), *shape), device=group[0].device) for shape, group in self._groups.items()
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for shape, group in self._groups.items():
            gradients = torch.stack([p.grad for p in group if p.grad is not None])
            buffer = self._buffers[shape]
            buffer.lerp_(gradients, 1 - self.momentum)
            update = orthogonalise(gradients.lerp(buffer, self.momentum)) * (-lr * 0.2 * max(shape) ** 0.5)
            torch._foreach_mul_(group, 1 - lr * self.weight_decay)
            torch._foreach_add_(group, list(update.unbind(0)))

    def state_dict(self) -> dict[str, Tensor]:
        return {"x".join(map(str, shape)): buffer for shape, buffer in self._buffers.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for shape, buffer in self._buffers.items():
            buffer.copy_(state["x".join(map(str, shape))])
