"""The log of a training run."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.models.tiny.questions import TYPES


class Report:
    """Counts between two lines of the log. Sums stay on the device until a line is written."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int, int], Tensor] = {}
        self._means: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, chunks: int, ratio: int, types: Tensor, right: Tensor) -> None:
        asked = torch.bincount(types.flatten(), minlength=len(TYPES) + 1).float()
        answered = torch.bincount(types.flatten(), weights=right.flatten().float(), minlength=len(TYPES) + 1)
        pair = torch.stack([answered, asked])
        self._counts[chunks, ratio] = self._counts.get((chunks, ratio), torch.zeros_like(pair)) + pair

    def mean(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._means[name].append(value.detach())

    def summary(self) -> dict[str, Any]:
        """Means, and accuracy by type for every (video length, ratio; 0 = mixed); resets."""
        result: dict[str, Any] = {name: round(float(torch.stack(v).mean()), 4) for name, v in self._means.items()}
        for (chunks, ratio), pair in sorted(self._counts.items()):
            answered, asked = pair.tolist()
            names = (*TYPES, "blind")
            result[f"n{chunks} r{ratio}"] = {
                n: round(a / b, 3) for n, a, b in zip(names, answered, asked, strict=True) if b
            }
        self._counts.clear()
        self._means.clear()
        return result

    def write(self, out: Path, line: Mapping[str, Any]) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        with (out / "train.jsonl").open("a") as file:
            file.write(text + "\n")
