"""New tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

CONTEXT = 5
"""Tokens before the new ones that are decoded with them: some tokenizers drop a leading space."""


class TextStream:
    """The text of one sample.

    Only the tokens since the last whole character are decoded again, so a long text costs no more a token than a
    short one. `text` is the text so far; `settled` is the part of it that no stop string can take back any more.

    Args:
        prompt: its tokens.
        stop: strings before which the text is cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: list[int], stop: tuple[str, ...]) -> None:
        self.tokenizer, self.stop, self.text = tokenizer, stop, ""
        self.ended = False
        self._ids = prompt[-CONTEXT:]
        self._start, self._shown = 0, len(self._ids)
        self._held = max(map(len, stop), default=1) - 1

    def push(self, token: int) -> bool:
        """Add a token; True where a stop string is complete, which ends the text before it."""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._shown])
        now = self._decode(self._ids[self._start :])
        if now.endswith("�"):
            return False
        self._start, self._shown = self._shown, len(self._ids)
        return self._extend(now[len(before) :])

    def end(self) -> None:
        """No more tokens: an unfinished character is shown as �."""
        if not self.ended:
            before = self._decode(self._ids[self._start : self._shown])
            self._extend(self._decode(self._ids[self._start :])[len(before) :])
        self.ended = True

    @property
    def settled(self) -> str:
        """The text that will not change."""
        return self.text if self.ended else self.text[: max(len(self.text) - self._held, 0)]

    def _extend(self, piece: str) -> bool:
        old = len(self.text)
        self.text += piece
        found = [self.text.find(stop, max(old - len(stop) + 1, 0)) for stop in self.stop]
        places = [place for place in found if place >= 0]
        if places:
            self.text, self.ended = self.text[: min(places)], True
        return bool(places)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
