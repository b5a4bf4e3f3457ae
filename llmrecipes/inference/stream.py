"""The text of tokens as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # how decoders show bytes that are no character (yet)
CONTEXT = 8  # tokens of the prompt that the first new ones are decoded after: a leading space depends on them
LONGEST_CHARACTER = 4  # bytes, so tokens, in UTF-8


class TextStream:
    """Turns ids into text, chunk by chunk; what was given out never changes.

    Only the last few ids are decoded again for each new one. Bytes of an unfinished character wait for the rest of it;
    if it never comes (the text was cut), they are left out.

    Args:
        decode: ids to text.
        before: ids that the text follows.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = _context(decode, before)
        self._start = 0  # first id decoded
        self._done = len(self._ids)  # first id whose text was not given out

    def add(self, token: int) -> str:
        """The text that ``token`` completes; often nothing."""
        self._ids.append(token)
        text = self._pending(len(self._ids))
        if text and not text.endswith(UNFINISHED):
            self._advance(len(self._ids))
            return text
        if len(self._ids) - self._done <= 2 * LONGEST_CHARACTER:
            return ""
        # No character is so long: all but the newest bytes are no text and never will be.
        end = len(self._ids) - LONGEST_CHARACTER + 1
        text = self._pending(end)
        self._advance(end)
        return text

    def end(self) -> str:
        """What is left when no more tokens come."""
        text = self._pending(len(self._ids)).rstrip(UNFINISHED)
        self._advance(len(self._ids))
        return text

    def _pending(self, end: int) -> str:
        known = self._decode(self._ids[self._start : self._done])
        return self._decode(self._ids[self._start : end])[len(known) :]

    def _advance(self, end: int) -> None:
        self._start, self._done = self._done, end


def _context(decode: Callable[[Sequence[int]], str], before: Sequence[int]) -> list[int]:
    """The last ids of ``before``, from the beginning of a character: some decoders take all bytes after half a
    character for broken."""
    choices = [list(before[-size:]) for size in range(CONTEXT, CONTEXT + LONGEST_CHARACTER)]
    return next((ids for ids in choices if UNFINISHED not in decode(ids)), choices[0])


class StopStrings:
    """Passes text on until one of ``stops`` appears; holds back what may be the beginning of one.

    Args:
        stops: texts that end the generation; they themselves are not part of it. Whichever is complete first
            counts, however the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would stop everything"
        self._stops = stops
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """What may be shown after ``text`` came."""
        if self.stopped:
            return ""
        self._held += text
        found = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._take(min(found)[1])
        return self._take(len(self._held) - self._risky())

    def end(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.stopped else self._take(len(self._held))

    def _risky(self) -> int:
        """Characters at the end that begin a stop string."""
        longest = min(len(self._held), max(map(len, self._stops), default=1) - 1)
        return next(
            (n for n in range(longest, 0, -1) if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0
        )

    def _take(self, end: int) -> str:
        text, self._held = self._held[:end], self._held[end:]
        if self.stopped:
            self._held = ""
        return text


class Writer:
    """One text being written: ids in, text out, and whether a stop string came.

    Args:
        decode: ids to text.
        before: ids of the prompt.
        stops: see :class:`StopStrings`.
        show: called with every piece of text as soon as it is final.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        before: Sequence[int],
        stops: Sequence[str] = (),
        show: Callable[[str], object] | None = None,
    ) -> None:
        self._stream, self._stops, self._show = TextStream(decode, before), StopStrings(stops), show
        self.text = ""

    def add(self, token: int) -> bool:
        """Takes a token; True when the text is to end here."""
        self._give(self._stops.add(self._stream.add(token)))
        return self._stops.stopped

    def end(self) -> None:
        """No more tokens come."""
        self._give(self._stops.add(self._stream.end()))
        self._give(self._stops.end())

    def _give(self, text: str) -> None:
        self.text += text
        if text and self._show is not None:
            self._show(text)
