"""What the engine tells of itself, in Prometheus' terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from kvstore.base import Tier
from server.engine.options import EngineOptions
from server.engine.request import Outcome

# A line "..._created" beside each counter and histogram is read by nobody.
disable_created_metrics()  # type: ignore[no-untyped-call]

Ending = Literal["ok", "cancelled", "not_found", "busy", "rejected", "unavailable", "failed"]
"""How a request for an answer or for relevance has ended."""

PassKind = Literal["decode", "prompt"]
"""Whether all rows of a pass decode, or some read their prompts."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BATCH = (1, 2, 4, 8, 16, 32, 64)


class EngineMetrics:
    """Counters, gauges and histograms in a registry of their own, so that engines do not share them."""

    def __init__(
        self,
        *,
        in_flight: Callable[[], int],
        running: Callable[[], int],
        resident_nbytes: Callable[[], int],
        resident_videos: Callable[[], int],
        shared_low_nbytes: Callable[[], int],
        prefetched_nbytes: Callable[[], int],
        options: EngineOptions,
        device: torch.device,
    ) -> None:
        """Takes functions that tell the gauges' values when they are asked for; from any thread."""
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "x2l_requests",
            "Requests for an answer or for relevance, by their end (also amid a stream): ok, cancelled (the client "
            "went away), not_found (404), busy (429), rejected (another 4xx), unavailable (503), failed (another 5xx)",
            ["outcome"],
            registry=registry,
        )
        for ending in get_args(Ending):
            self.requests.labels(ending)  # there from the start, at 0
        self.prompt_tokens = Counter(
            "x2l_prompt_tokens", "Tokens of prompts, without the videos' KVs, which are not computed", registry=registry
        )
        self.tokens = Counter("x2l_generated_tokens", "Tokens generated", registry=registry)
        self.reload_bytes = Counter(
            "x2l_reload_bytes", "Bytes of L-KVs for questions, by where they were", ["tier"], registry=registry
        )
        self.reload_seconds = self._seconds(
            "x2l_reload_seconds", "Time of a question's re-load, by the slowest tier that it went to", "tier"
        )
        self.prefetched = Counter("x2l_prefetched_chunks", "L-KVs read before a question asked", registry=registry)
        self.prefetch_hits = Counter("x2l_prefetch_hits", "Those of them that one did ask for", registry=registry)
        self.degraded = Counter("x2l_degraded", "Answers in which an H-KV stood in for an L-KV", registry=registry)
        self.chunks = Counter("x2l_prefilled_chunks", "Chunks of uploads prefilled", registry=registry)
        self.batch = Histogram("x2l_batch_size", "Sequences in a forward pass", buckets=_BATCH, registry=registry)
        self.queue_seconds = self._seconds("x2l_queue_seconds", "Time from a question's submission to its slot")
        self.first_token_seconds = self._seconds(
            "x2l_first_token_seconds", "Time from a question's submission to the first token of its answer"
        )
        self.chunk_seconds = self._seconds("x2l_prefill_chunk_seconds", "Time to prefill one chunk of an upload")
        self.phases = {
            phase: self._seconds(f"x2l_{phase}_seconds", f"Time of a question's {phase} phase")
            for phase in ("score", "prefill", "decode")
        }
        self.pass_seconds = self._seconds(
            "x2l_forward_seconds",
            "Time of a forward pass with its draw: all decoding (if asked for ahead, since the one before), or with a "
            "prompt",
            "kind",
        )
        for name, text, value in (
            ("x2l_requests_in_flight", "Requests accepted and not ended", in_flight),
            ("x2l_requests_running", "Requests that hold a slot", running),
            ("x2l_requests_waiting", "Requests that wait for a slot or a video", lambda: in_flight() - running()),
            ("x2l_resident_bytes", "Bytes of H-KVs on the device", resident_nbytes),
            ("x2l_resident_budget_bytes", "Room for them; 0: no bound", lambda: options.resident_nbytes or 0),
            ("x2l_resident_videos", "Videos whose H-KVs are on the device", resident_videos),
            ("x2l_shared_low_bytes", "Bytes of L-KVs that stay on the device for other questions", shared_low_nbytes),
            ("x2l_prefetched_bytes", "Bytes of L-KVs that were read ahead and not asked for yet", prefetched_nbytes),
            ("x2l_shared_low_budget_bytes", "Room for them on a GPU", lambda: options.shared_low_nbytes),
            *_memory_of(device),
        ):
            Gauge(name, text, registry=registry).set_function(value)

    def answered(self, outcome: Outcome) -> None:
        """Counts what a request that has ended well took."""
        self.prompt_tokens.inc(outcome.prompt_tokens - outcome.cached_tokens)
        self.degraded.inc(outcome.degraded)
        times_ms = {
            "score": outcome.score_ms,
            "prefill": outcome.prefill_ms,
            "decode": outcome.decode_ms,
        }
        for phase, time_ms in times_ms.items():
            self.phases[phase].observe(time_ms / 1000)

    def prefilled(self, took_s: float) -> None:
        """Counts a chunk of an upload, which took the engine so long."""
        self.chunks.inc()
        self.chunk_seconds.observe(took_s)

    def reloaded(self, nbytes: Mapping[Tier, int], took_s: float) -> None:
        """Counts a question's re-load: bytes of every tier that it took from."""
        taken = [tier for tier in get_args(Tier) if nbytes.get(tier)]
        for tier in taken:
            self.reload_bytes.labels(tier).inc(nbytes[tier])
        if taken:
            self.reload_seconds.labels(taken[-1]).observe(took_s)

    def passed(self, kind: PassKind, num_rows: int, took_s: float) -> None:
        """Counts a forward pass of questions."""
        self.batch.observe(num_rows)
        self.pass_seconds.labels(kind).observe(took_s)

    def ended(self, ending: Ending) -> None:
        """Counts a request, whether or not it came as far as the engine."""
        self.requests.labels(ending).inc()

    def _seconds(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=_SECONDS, registry=self.registry)


def _memory_of(device: torch.device) -> tuple[tuple[str, str, Callable[[], int]], ...]:
    """Gauges of a GPU's memory, as torch counts it."""
    if device.type != "cuda":
        return ()
    return (
        ("x2l_device_allocated_bytes", "Bytes of tensors on the GPU", partial(torch.cuda.memory_allocated, device)),
        ("x2l_device_peak_bytes", "The most there were so far", partial(torch.cuda.max_memory_allocated, device)),
        ("x2l_device_reserved_bytes", "Bytes taken from the GPU", partial(torch.cuda.memory_reserved, device)),
    )
