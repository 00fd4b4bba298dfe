"""Token ids to text, as they come: never half a character, never a piece of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Incremental decoding of one answer. The pieces together are what decoding all ids at once gives."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # ids[_context:_done] are decoded again as context, because some tokenizers write a word differently at the
        # start of a text; ids[_done:] are not yet shown.
        self._context = 0
        self._done = 0

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes, "" while a character is unfinished."""
        self._ids.append(token_id)
        text = self._rest()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._context, self._done = self._done, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left at the end, where an unfinished character becomes U+FFFD."""
        text = self._rest()
        self._context = self._done = len(self._ids)
        return text

    def _rest(self) -> str:
        shown = self._decode(self._ids[self._context : self._done])
        return self._decode(self._ids[self._context :])[len(shown) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
        return text


class StopStrings:
    """Cuts a text before the stop string that is complete first, and holds back what may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [text for text in stop if text]
        self._held = ""
        self.met = False

    def push(self, text: str) -> str:
        """The text that is safe to show now. After a stop string was :attr:`met` there is none."""
        if self.met:
            return ""
        self._held += text
        # The one that is complete first wins, so the cut does not depend on how the text was split into pieces.
        found = [(start + len(stop), start) for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if found:
            self.met = True
            return self._take(min(found)[1])
        return self._take(len(self._held) - self._may_begin_a_stop())

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        return "" if self.met else self._take(len(self._held))

    def _may_begin_a_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0

    def _take(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        return text
