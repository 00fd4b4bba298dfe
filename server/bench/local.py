"""Questions in this process: through the engine, as the server asks, and over caches that a baseline has built."""

from __future__ import annotations

import itertools
import queue
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from compression.compressor import RawChunk, join
from compression.kv import ChunkKV
from compression.methods import COMPRESSORS, EVICTIONS
from compression.mixed import MixedCache
from compression.score import AttentionScorer, Scorer
from compression.select import Dial
from compression.snap import Snap
from kvstore import codec
from kvstore.base import Store
from kvstore.disk import DiskStore
from kvstore.errors import MissingBlob, StoreError
from kvstore.key import KVKey
from kvstore.video import VideoStore
from server.bench.decoder import CacheDecoder
from server.bench.reply import MAX_TOKENS, PHASES, Reply
from server.bench.video import VideoRefused
from server.engine.engine import Engine
from server.engine.errors import EngineError
from server.engine.options import EngineOptions
from server.engine.record import FileRecord, VideoStatus
from server.engine.request import Delta, Outcome, Request, SamplingParams
from server.models.base import Row, Turn, VideoModel
from server.models.families.one_pass import OnePassModel, OnePassPrefill
from server.models.videoxl.model import VideoXL
from server.models.videoxl.raw import RawPrefill
from server.video.reader import Sampling, VideoLimits, VideoReader

_BATCH = 16
_POLL_S = 0.01


class LocalBench:
    """A model behind an engine with a disk store of its own in the folder ``work``, which goes in the end."""

    def __init__(self, load: Callable[..., VideoModel], model: VideoModel, work: Path) -> None:
        """``load(**settings)`` loads ``model`` once more with other ratios or another prefill mode."""
        self.load, self.model = load, model
        disable_progress_bar()  # transformers' own, at every load, would tear the table's
        self._work = work
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
        work.mkdir(parents=True)
        self._store: Store = DiskStore(work / "store")
        self.engine = Engine(self.model, self._store, EngineOptions(max_batch=_BATCH, keep_video=False))
        self.engine.start()

    def __enter__(self) -> LocalBench:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()
        self._store.close()
        shutil.rmtree(self._work)

    @contextmanager
    def open(self, path: Path) -> Iterator[LocalVideo]:
        """Decodes, prefills and stores the video; it is deleted in the end. Raises VideoRefused, VideoError."""
        library = self.engine.library
        copy = self._work / path.name
        shutil.copyfile(path, copy)  # the library takes the file over
        record = library.create(
            copy,
            filename=path.name,
            purpose="vision",
            sampling=Sampling(self.model.spec.fps),
            tenant="",
            expires_after_s=None,
            source="upload",
        )
        try:
            while record.status == "uploaded":
                time.sleep(_POLL_S)
                record = library.get(record.id, "") or record
            if record.status == "error" or record.video is None:
                raise VideoRefused(record.status_details or "the prefill failed")
            yield LocalVideo(self, self._store, record, record.video, path)
        finally:
            library.delete(record.id, "")


class LocalVideo:
    """A prefilled video. What only some methods need of it is made when the first of them asks."""

    _ids = itertools.count()

    def __init__(self, bench: LocalBench, store: Store, record: FileRecord, status: VideoStatus, path: Path) -> None:
        self.model: VideoModel = bench.model
        self.decoder = CacheDecoder(bench.model)
        self.num_chunks = status.num_chunks
        self.default_reload = self.model.spec.default_reload
        self.prefill_s = status.prefill_s or 0.0
        self._bench, self._store, self._record, self._status, self._path = bench, store, record, status, path
        self._prefilled: dict[tuple[object, ...], tuple[list[ChunkKV], list[ChunkKV]]] = {}

    @property
    def default_tokens(self) -> int:
        """KV tokens of the mixed cache with the default number of chunks re-loaded, without the prefix."""
        gains = [low - high for low, high in zip(self._status.low_tokens, self._status.high_tokens, strict=True)]
        return self._status.tokens_high + sum(sorted(gains, reverse=True)[: self.default_reload])

    @cached_property
    def low(self) -> list[ChunkKV]:
        """The L-KVs, as they come from the store. Raises StoreError."""
        read = self._videos.read_low(self._key, range(self.num_chunks))
        damaged = next((kv for kv in read if isinstance(kv, Exception)), None)
        if damaged is not None:
            raise damaged
        return [self._to_device(kv) for kv in read if isinstance(kv, ChunkKV)]

    @cached_property
    def low_int8(self) -> list[ChunkKV]:
        """The L-KVs as they come from a store that keeps them as int8. Raises StoreError."""
        kept = (codec.decode(codec.encode(kv, "int8")) for kv in self.low)
        return [self._to_device(kv) for kv in kept]

    @cached_property
    def high(self) -> list[ChunkKV]:
        """The H-KVs, as they come from the store. Raises StoreError."""
        high = self._videos.read_high(self._key)
        if high is None:
            raise MissingBlob("the video is no longer in the store")
        return [self._to_device(kv) for kv in high.chunks]

    @cached_property
    def features(self) -> list[Any]:
        """The visual tokens of every chunk, decoded and encoded once more. Raises VideoError."""
        return encode_video(self.model, self._path)

    @cached_property
    def raw(self) -> list[RawChunk]:
        """The uncompressed KVs of every chunk, each computed over those of all earlier ones."""
        if isinstance(self.model, OnePassModel):
            whole, last = OnePassPrefill(self.model, "exact"), self.num_chunks - 1
            return [whole.append_raw(part, last=index == last) for index, part in enumerate(self.features)]
        if not isinstance(self.model, VideoXL):
            raise TypeError(f"no uncompressed prefill for {self.model.spec.name}")
        run = RawPrefill(self.model)
        return [run.append(features) for features in self.features]

    def kept(self, method: str, scores: Sequence[float] = ()) -> list[ChunkKV]:
        """What one of :data:`compression.methods.EVICTIONS` keeps of the uncompressed KVs where the default's budget
        is its own; tokens that are not visual always stay."""
        kept = EVICTIONS[method].keep(self.raw, self._visual_budget, scores)
        return [chunk.with_others(kv) for chunk, kv in zip(self.raw, kept, strict=True)]

    def kept_for(self, text: str) -> ChunkKV:
        """SnapKV as published: the same of the whole video at once, where the question that follows is the window."""
        asked = self._raw_asked(text)
        return asked.with_others(Snap().compress(asked, self._visual_budget).kv)

    @property
    def _visual_budget(self) -> int:
        return self.default_tokens - sum(chunk.num_others for chunk in self.raw)

    def _raw_asked(self, text: str) -> RawChunk:
        """The uncompressed KVs of the whole video as one chunk, judged by all tokens of a question that follows it."""
        cache, whole = self._raw_cache
        with torch.inference_mode(), self._scoring(AttentionScorer()):  # the one that needs every layer's queries
            trace = self.model.trace([Row(self.decoder.prompt(text), cache)])[0]
        positions = trace.start + torch.arange(trace.queries.shape[2], device=trace.queries.device)
        return whole.seen_by(trace.queries, positions)

    @cached_property
    def _raw_cache(self) -> tuple[MixedCache, RawChunk]:
        whole = join(self.raw)
        return self.decoder.cache([whole.with_others(whole.kv)]), whole

    @cached_property
    def representatives(self) -> list[ChunkKV]:
        """Every chunk's raw KVs of visual tokens averaged to one token."""
        return [COMPRESSORS["pool"].compress(chunk, 1).kv for chunk in self.raw]

    def prefilled(
        self,
        low_ratio: int | None = None,
        high_ratio: int | None = None,
        prefill_mode: str | None = None,
        compressor: str | None = None,
    ) -> tuple[list[ChunkKV], list[ChunkKV]]:
        """The L-KVs and H-KVs that the model makes with these settings in place of its own."""
        settings = low_ratio, high_ratio, prefill_mode, compressor
        if settings not in self._prefilled:
            model = self._bench.load(
                low_ratio=low_ratio, high_ratio=high_ratio, prefill_mode=prefill_mode, compressor=compressor
            )
            run, last = model.prefill(), self.num_chunks - 1
            pairs = [run.append(part, last=index == last) for index, part in enumerate(self.features)]
            self._prefilled[settings] = [low for low, _ in pairs], [high for _, high in pairs]
        return self._prefilled[settings]

    def uniform(self, ratio: int) -> list[ChunkKV]:
        """The KVs of every chunk at one ratio."""
        return self.prefilled(ratio, ratio)[0]

    def ask(self, asked: Sequence[tuple[str, Dial]], scorer: Scorer | None = None) -> list[Reply]:
        """See :meth:`server.bench.video.AskedVideo.ask`."""
        return self._through_engine(asked, scorer, generate=True)

    def scores(self, texts: Sequence[str], scorer: Scorer | None = None) -> list[tuple[float, ...]]:
        """One relevance score a chunk for every text. Raises RuntimeError."""
        replies = self._through_engine([(text, Dial()) for text in texts], scorer, generate=False)
        for reply in replies:
            if reply.error is not None:
                raise RuntimeError(reply.error)
        return [reply.scores for reply in replies]

    @torch.inference_mode()
    def score_over(self, text: str, chunks: Sequence[ChunkKV], scorer: Scorer, draft: str = "") -> list[float]:
        """One score a chunk for a question, and a draft of its answer, read over these KVs (in place of the H-KVs)."""
        cache = self.decoder.cache(chunks)
        draft_ids = self.model.tokenizer.encode(draft, add_special_tokens=False)
        with self._scoring(scorer):
            ids = torch.tensor([*self.decoder.prompt(text).tolist(), *draft_ids], device=self.model.device)
            trace = replace(self.model.trace([Row(ids, cache)])[0], num_asking=1 + len(draft_ids))
        scores: list[float] = scorer.score(trace, cache, chunks, self.model.rope).tolist()
        return scores

    def _through_engine(
        self, asked: Sequence[tuple[str, Dial]], scorer: Scorer | None, *, generate: bool
    ) -> list[Reply]:
        replies: list[Reply] = []
        with self._scoring(scorer):
            for start in range(0, len(asked), _BATCH):
                replies += self._ask_batch(asked[start : start + _BATCH], generate)
        return replies

    @contextmanager
    def _scoring(self, scorer: Scorer | None) -> Iterator[None]:
        """Lends the model a scorer; the engine is idle before and after."""
        own = self.model.scorer
        self.model.scorer = own if scorer is None else scorer
        try:
            yield
        finally:
            self.model.scorer = own

    def _ask_batch(self, asked: Sequence[tuple[str, Dial]], generate: bool) -> list[Reply]:
        inbox: queue.SimpleQueue[tuple[int, Delta]] = queue.SimpleQueue()
        texts, replies = [""] * len(asked), [Reply() for _ in asked]
        waiting = 0
        for number, (text, dial) in enumerate(asked):
            request = Request(
                id=f"bench-{next(self._ids)}",
                turns=(Turn("user", text),),
                params=SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS),
                file_ids=(self._record.id,),
                tenant="",
                dial=dial,
                generate=generate,
            )
            try:
                self._bench.engine.submit(request, partial(_post, inbox, number))
                waiting += 1
            except (EngineError, ValueError, StoreError) as error:
                replies[number] = Reply(error=f"{type(error).__name__}: {error}")
        while waiting:
            number, delta = inbox.get()
            texts[number] += delta.text
            waiting -= delta.final
            if delta.error is not None:
                replies[number] = Reply(error=f"{type(delta.error).__name__}: {delta.error}")
            elif delta.outcome is not None:
                replies[number] = self._reply(texts[number], delta.outcome)
        return replies

    def _reply(self, text: str, outcome: Outcome) -> Reply:
        return Reply(
            text=text,
            error="degraded: an L-KV could not be read" if outcome.degraded else None,
            kv_tokens=outcome.mixed_tokens,
            kv_nbytes=outcome.mixed_tokens * self.model.token_nbytes,
            reload_nbytes=outcome.reload_nbytes,
            reloaded=outcome.selection,
            spans_s=tuple((evidence.start_s, evidence.end_s) for evidence in outcome.evidence),
            scores=outcome.scores,
            times_ms={phase: getattr(outcome, f"{phase}_ms") for phase in PHASES},
        )

    @property
    def _videos(self) -> VideoStore:
        return VideoStore(self._store)

    @cached_property
    def _key(self) -> KVKey:
        video = self._bench.engine.library.video(self._record.id, "")
        if video is None:
            raise MissingBlob("the video is no longer in the store")
        return video.key

    def _to_device(self, kv: ChunkKV) -> ChunkKV:
        return kv.to(self.model.device)


def encode_video(model: VideoModel, path: Path) -> list[Any]:
    """The visual tokens of every chunk of a video file, as the model's prefill takes them. Raises VideoError."""
    size = model.spec.frames_per_chunk
    with VideoReader(path, Sampling(model.spec.fps), VideoLimits()) as reader:
        parts = [(model.preprocess(frames), frames.times_s) for frames in reader]
    pixels, times_s = torch.cat([part for part, _ in parts]), np.concatenate([times for _, times in parts])
    return [
        model.encode(pixels[start : start + size].to(model.device), times_s[start : start + size])
        for start in range(0, len(pixels), size)
    ]


def _post(inbox: queue.SimpleQueue[tuple[int, Delta]], number: int, delta: Delta) -> None:
    inbox.put((number, delta))
