"""What is asked of bi-level compression with re-load, and whether a run shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.bench.summary import uniform_at

Methods = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Target:
    """``measure`` gives a figure of one length's methods; None where it was not measured."""

    name: str
    chunks: tuple[int, ...]
    bound: float
    measure: Callable[[Methods], float | None]
    at_most: bool = False


def check(summary: Sequence[Mapping[str, Any]], default: str) -> list[dict[str, Any]]:
    """Every target that the run says something about. ``default`` is the method that a server uses by itself."""
    checked = []
    for part in summary:
        for target in _targets(default):
            if part["chunks"] not in target.chunks:
                continue
            try:
                value = target.measure(part["methods"])
            except (KeyError, TypeError):  # not measured
                value = None
            if value is None:
                continue
            met = value <= target.bound + 1e-9 if target.at_most else value >= target.bound - 1e-9
            checked.append(
                {
                    "chunks": part["chunks"],
                    "target": target.name,
                    "value": round(value, 4),
                    "at_most" if target.at_most else "at_least": target.bound,
                    "met": met,
                }
            )
    return checked


def _targets(default: str) -> list[Target]:
    def accuracy(methods: Methods, name: str = default) -> float:
        return float(methods[name]["accuracy"]["share"])

    def code(row: Mapping[str, Any]) -> float:
        return float(row["by_type"]["code"]["share"])

    def over_uniform(methods: Methods) -> float | None:
        uniform = uniform_at(methods, methods[default]["kv_tokens"], code)
        return None if uniform is None else code(methods[default]) - uniform

    def share_of_low(methods: Methods) -> float | None:
        low = accuracy(methods, "low")
        return accuracy(methods) / low if low else None

    def tokens(methods: Methods) -> float:
        return float(methods[default]["kv_tokens"] / methods["low"]["kv_tokens"])

    return [
        Target("default's accuracy, of L-only's", (16,), 0.97, share_of_low),
        Target("default's accuracy, of L-only's", (64,), 0.95, share_of_low),
        Target("default's KV tokens, of L-only's", (16,), 0.25, tokens, at_most=True),
        Target("default's KV tokens, of L-only's", (64,), 0.12, tokens, at_most=True),
        Target("default over uniform at its KV tokens, code", (16,), 0.20, over_uniform),
        Target("the scorer's recall@3", (16,), 0.95, lambda methods: methods[default]["recall"]["3"]),
        Target("the scorer's recall@3", (64,), 0.90, lambda methods: methods[default]["recall"]["3"]),
        Target("L-only's accuracy", (16,), 0.97, lambda methods: accuracy(methods, "low")),
        Target("L-only's accuracy", (64,), 0.90, lambda methods: accuracy(methods, "low")),
        Target("L-only's accuracy", (128,), 0.80, lambda methods: accuracy(methods, "low")),
        Target(
            "three chunks re-loaded contain the true span",
            (8, 16, 32, 64, 128),
            0.95,
            lambda methods: methods["attention-3"]["contained"]["share"],
        ),
    ]
