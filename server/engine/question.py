"""A request in flight."""

from __future__ import annotations

import enum
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from compression.chunk import Chunk
from compression.kv import ChunkKV
from compression.mixed import MixedCache
from compression.score import QueryTrace
from compression.segments import RotatedKV
from compression.select import CacheSizes, Selection, select
from kvstore.key import KVKey
from kvstore.manifest import Manifest
from kvstore.resident import Lease
from server.engine.caches import Caches, Low, LowKey, Placed
from server.engine.detokenize import Detokenizer, StopStrings
from server.engine.errors import ContextLengthExceeded
from server.engine.options import EngineOptions
from server.engine.prompt import Prompt
from server.engine.request import Delta, Evidence, FileChunks, FinishReason, Outcome, Request
from server.engine.sampler import Sampler
from server.engine.transfer import Arrival
from server.engine.video import Video
from server.models.base import Row, Step, VideoModel


class Phase(enum.Enum):
    """Where a question stands. From LOADING to DECODE it holds one of the slots."""

    WAITING = enum.auto()  # a video of it is being prefilled
    QUEUED = enum.auto()  # for a slot
    LOADING = enum.auto()  # its videos' H-KVs come from the store
    SCORE = enum.auto()
    RELOADING = enum.auto()  # the selected L-KVs come from the store
    PREFILL = enum.auto()
    DECODE = enum.auto()
    ENDED = enum.auto()

    @property
    def running(self) -> bool:
        return self not in (Phase.WAITING, Phase.QUEUED, Phase.ENDED)


class Question:
    """One request and all that is known of it while it lives; the engine thread's own once it is in the scheduler."""

    def __init__(
        self,
        request: Request,
        on_delta: Callable[[Delta], None],
        model: VideoModel,
        caches: Caches,
        options: EngineOptions,
    ) -> None:
        """Raises ContextLengthExceeded if the prompt alone is too long."""
        self.request = request
        self.on_delta = on_delta
        self.phase = Phase.QUEUED
        self.videos: dict[str, Video] = {}
        """By the ids of the files in the request, in their order."""
        self.healed: set[KVKey] = set()
        """Which of them were found damaged before: a second time is an error."""
        self.leases: Sequence[Lease] = ()
        """On the videos' H-KVs, while it runs."""
        self.cache: MixedCache | None = None
        self.selection = Selection(())
        self.sampler = Sampler(request.params)
        self._model = model
        self._caches = caches
        self._options = options
        asked = request.params.max_tokens
        self._most_tokens = options.max_tokens if asked is None else min(asked, options.max_tokens)
        self._least_tokens = 1 if asked is None else self._most_tokens
        self._prompt = Prompt(model, request, step=options.prompt_step)
        self._detokenizer = Detokenizer(model.tokenizer)
        self._stops = StopStrings(request.params.stop)
        self._chunks: tuple[tuple[str, Chunk], ...] = ()
        """Of all videos, one behind the other, each with its file's id."""
        self._sizes = CacheSizes(0, (), ())
        self._next_position: int | None = None
        """Behind the videos, where that does not follow from their size in tokens."""
        self._shifts: dict[str, int] = {}
        """How far a file's chunks stand from where they were prefilled; only where they bring their positions."""
        self._low: dict[int, Low] = {}
        """Selected L-KVs by place that are on the device, until the cache is put together."""
        self._scores: tuple[float, ...] = ()
        self._degraded = False
        self._reload_nbytes = 0
        self._last_token = 0
        self._num_asked = self._row = 0
        """Tokens that steps draw and that are not known yet, and this question's row in the last of these steps."""
        self.num_tokens = 0
        """Drawn so far."""
        self._max_tokens = self._room(0)
        self.submitted_s = time.perf_counter()
        self.had_slot = False
        self._lap_s = time.perf_counter()
        self._ms = {"score": 0.0, "reload": 0.0, "prefill": 0.0, "decode": 0.0}

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def num_prompt_tokens(self) -> int:
        """Those of its images and its text."""
        return self._prompt.num_tokens

    def check(self, manifests: Sequence[Manifest]) -> None:
        """Refuses what can be known to fail before anything is scored, and notes what the videos are made of.

        Raises SelectionError, ContextLengthExceeded.
        """
        files = zip(self.request.file_ids, manifests, strict=True)
        self._chunks = tuple((file_id, record.chunk) for file_id, manifest in files for record in manifest.records)
        records = [record for manifest in manifests for record in manifest.records]
        low, high = [record.num_low_tokens for record in records], [record.num_high_tokens for record in records]
        num_prefix = manifests[0].num_prefix_tokens
        self._sizes = CacheSizes(num_prefix, low, high)
        self._next_position = None
        for file_id, manifest in zip(self.request.file_ids, manifests, strict=True):
            if manifest.next_position is not None:
                start = num_prefix if self._next_position is None else self._next_position
                self._shifts[file_id] = start - num_prefix
                self._next_position = manifest.next_position + start - num_prefix
        likely = self._select([0.0] * len(records))
        exact = self.request.dial.chunks is not None or self.request.dial.mode == "low"
        self._room(self._sizes.mixed(likely if exact else Selection(())))

    def read_text_only(self, prefix: ChunkKV) -> None:
        """Makes ready to answer without a video. Raises ContextLengthExceeded."""
        self._sizes = CacheSizes(prefix.num_tokens, (), ())
        self._max_tokens = self._room(prefix.num_tokens)
        self._lap()
        self._prompt.encode()
        room = self._prompt.num_tokens + self._max_tokens
        self.cache = MixedCache(prefix, [], self._model.rope, room=room)

    def read_on(self) -> bool:
        """Reads the next piece of the prompt over the H-KVs of all videos, but not the last one; whether that comes
        now, which :meth:`row` then is."""
        model, prompt = self._model, self._prompt
        if self.cache is None:
            self._lap()
            prompt.encode()
            # It serves the answer too where nothing is re-loaded.
            room = prompt.num_tokens + self._most_tokens
            self.cache = self._caches.assemble(self._placed, {}, min(room, model.spec.max_positions))
        if prompt.at_last:
            return True
        model.forward([prompt.row(self.cache)])
        prompt.advance()
        return False

    def score(self, trace: QueryTrace) -> None:
        """Scores the chunks by what the last piece of the prompt looks at, and selects what to re-load. With nothing to
        re-load it is then ready to answer from the H-KVs.

        Raises SelectionError, ContextLengthExceeded.
        """
        model, cache = self._model, self.cache
        assert cache is not None
        cache.forget_conversation()
        self._prompt.rewind()
        chunks = self._caches.chunks(self._placed) if model.scorer.reads_chunks else ()
        self._scores = tuple(model.scorer.score(trace, cache, chunks, model.rope).tolist())
        self.selection = self._select(self._scores)
        self._max_tokens = self._room(self._sizes.mixed(self.selection))
        self._ms["score"] = self._lap()
        if self.selection.chunks:
            self.cache = None

    def wanted(self) -> list[tuple[int, Video, int]]:
        """What is to be read from the store, in the order of the cache: the chunk's place there, its video, its index
        in that. L-KVs that are on the device already are held for :meth:`reload`."""
        found = {place: self._caches.find_low(self._low_key(place)) for place in sorted(self.selection.chunks)}
        self._low = {place: low for place, low in found.items() if low is not None}
        named = [(place, *self._chunks[place]) for place, low in found.items() if low is None]
        return [(place, self.videos[file_id], chunk.index) for place, file_id, chunk in named]

    def expected(self, before: Mapping[KVKey, Collection[int]]) -> list[int]:
        """Places of chunks whose L-KVs are likely to be wanted soon, best first. Until the chunks are scored, if any
        may be re-loaded: those that were selected ``before``, by video. Then: those that are scored next best, as many
        as are selected now."""
        if self._scores:
            others = [place for place in range(len(self._chunks)) if place not in self.selection.chunks]
            others.sort(key=lambda place: -self._scores[place])
            return others[: len(self.selection.chunks)]
        if self.request.dial.mode == "high" or self.request.dial.reload == 0:
            return []
        keys = [self._low_key(place) for place in range(len(self._chunks))]
        return [place for place, (key, index) in enumerate(keys) if index in before.get(key, ())]

    def low_of(self, place: int) -> tuple[Video, int, int]:
        """A chunk's L-KV: its video, its index in that, its KV tokens."""
        file_id, chunk = self._chunks[place]
        return self.videos[file_id], chunk.index, self._sizes.low[place]

    @property
    def held_nbytes(self) -> int:
        """Bytes of the L-KVs that :meth:`wanted` found on the device, until they are in the cache."""
        return sum(low.nbytes for low in self._low.values() if isinstance(low, RotatedKV))

    @property
    def reload_s(self) -> float:
        """What the re-load took, once it is done."""
        return self._ms["reload"] / 1000

    def reload(self, low: Mapping[int, Arrival]) -> None:
        """Makes ready to answer: the selected chunks' L-KVs, those in ``low`` by place, which were read from the store,
        and those that were on the device already; the H-KVs of the others and of those that could not be read."""
        self._reload_nbytes = sum(arrival.nbytes for arrival in low.values())
        for place, arrival in low.items():
            self._low[place] = self._caches.add_low(self._low_key(place), arrival.take())
        self._degraded = any(place not in self._low for place in self.selection.chunks)
        room = self._prompt.num_tokens + self._max_tokens
        self.cache = self._caches.assemble(self._placed, self._low, room)
        self._low = {}
        self._ms["reload"] = self._lap()

    def row(self) -> Row:
        """What it puts into the next pass: the next piece of its prompt, or the token drawn last."""
        assert self.cache is not None
        if self.phase in (Phase.SCORE, Phase.PREFILL):
            return self._prompt.row(self.cache)
        return Row(torch.tensor([self._last_token], device=self._model.device), self.cache)

    def step(self) -> Step:
        """What it puts into the next step of a decoder, while it decodes."""
        assert self.cache is not None
        source = self._row if self._num_asked else None
        return Step(self._last_token, self.cache, self.sampler.on_device, source)

    def asked(self, row: int) -> None:
        """Tells that the step was asked for, and which row of it this question has."""
        self._num_asked, self._row = self._num_asked + 1, row

    @property
    def wants_token(self) -> bool:
        """Whether one more is to be drawn, behind those that are on their way."""
        return self.phase is Phase.DECODE and self.num_tokens + self._num_asked < self._max_tokens

    def accept(self, token: int) -> Delta:
        """Takes the token drawn for :meth:`row` or :meth:`step`; what the client gets to see of it, and the end if this
        was it.

        A token drawn amid the prompt means nothing.
        """
        self._num_asked = max(0, self._num_asked - 1)
        if self.phase is Phase.PREFILL:
            self._prompt.advance()
            if not self._prompt.ended:
                return Delta()
            self._ms["prefill"] = self._lap()
            self.phase = Phase.DECODE
        if token in self._model.end_ids and not self.request.params.ignore_eos:
            return self.finish("stop")
        self._last_token = token
        self.num_tokens += 1
        text = self._stops.push(self._detokenizer.push(token))
        if self._stops.met:
            return self.finish("stop", text)
        if self.num_tokens >= self._max_tokens:
            return self.finish("length", text)
        return Delta(text)

    def finish(self, reason: FinishReason, text: str = "") -> Delta:
        """The final delta, with ``text`` and whatever was held back."""
        text += self._stops.push(self._detokenizer.flush()) + self._stops.flush()
        if self.phase is Phase.DECODE:
            self._ms["decode"] = self._lap()
        return Delta(text, "stop" if self._stops.met else reason, self._outcome())

    def release(self) -> None:
        """Lets go of all memory; nothing may follow."""
        self.phase = Phase.ENDED
        self.cache = None
        self._low = {}
        for lease in self.leases:
            lease.release()
        self.leases = ()

    @property
    def _placed(self) -> list[Placed]:
        """All videos, one behind the other; the prefix is the model's, and so the same in each."""
        files = zip(self.request.file_ids, self.leases, strict=True)
        return [Placed(lease.kv, self._shifts.get(file_id, 0)) for file_id, lease in files]

    def _low_key(self, place: int) -> LowKey:
        file_id, chunk = self._chunks[place]
        return self.videos[file_id].key, chunk.index

    def _room(self, num_mixed: int) -> int:
        """Tokens that the answer may have behind a mixed cache of ``num_mixed``. Raises ContextLengthExceeded."""
        start = num_mixed if self._next_position is None else self._next_position
        limit, used = self._model.spec.max_positions, start + self._prompt.num_tokens
        if used + self._least_tokens > limit:
            raise ContextLengthExceeded(limit, used + self._least_tokens)
        return min(self._most_tokens, limit - used)

    def _select(self, scores: Sequence[float]) -> Selection:
        own, models = self._options.default_reload, self._model.spec.default_reload
        default = models if own is None else own
        dial, chunks = self.request.dial, [chunk for _, chunk in self._chunks]
        chosen = select(scores, dial, chunks, self._sizes, default_reload=default)
        if dial.reload is None and dial.budget_tokens is None and dial.chunks is None and dial.mode in (None, "auto"):
            # Nobody asked for these: behind a very long video there may be room for fewer.
            room = self._model.spec.max_positions - self._prompt.num_tokens - self._least_tokens
            while self._next_position is None and chosen.chunks and self._sizes.mixed(chosen) > room:
                chosen = Selection(chosen.chunks[:-1])
        return chosen

    def _lap(self) -> float:
        """Milliseconds since the last lap."""
        last_s, self._lap_s = self._lap_s, time.perf_counter()
        return (self._lap_s - last_s) * 1000

    def _outcome(self) -> Outcome:
        chosen = [(*self._chunks[place], self._scores[place]) for place in self.selection.chunks]
        counts = Counter(file_id for file_id, _ in self._chunks)
        sizes = self._sizes
        mixed = sizes.mixed(self.selection) if self.cache is None else self.cache.num_mixed
        return Outcome(
            files=tuple(FileChunks(file_id, counts[file_id]) for file_id in self.request.file_ids),
            evidence=tuple(
                Evidence(file_id, chunk.index, chunk.start_s, chunk.end_s, score) for file_id, chunk, score in chosen
            ),
            scores=self._scores,
            selection=self.selection.chunks,
            mixed_tokens=mixed,
            low_tokens=sizes.prefix + sum(sizes.low),
            high_tokens=sizes.prefix + sum(sizes.high),
            degraded=self._degraded,
            score_ms=self._ms["score"],
            reload_ms=self._ms["reload"],
            prefill_ms=self._ms["prefill"],
            decode_ms=self._ms["decode"],
            reload_nbytes=self._reload_nbytes,
            prompt_tokens=mixed + self._prompt.num_tokens,
            completion_tokens=self.num_tokens,
            cached_tokens=mixed,
        )
