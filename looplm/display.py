"""Tokens coloured by their depth: the number of loops (counted from 1) each one was read at.

One ramp serves every surface: pale and cool for shallow, strong and warm for deep. Its anchors are seven
equal steps of a path through OKLab (Ottosson, 2020) whose lightness only falls, so the order survives colour
blindness and grey print; dark text on any of its colours has a contrast of at least 5.9 (WCAG asks 4.5).
Terminals show it behind dark text, which reads the same on dark and on light ones.
"""

import unicodedata
from collections.abc import Sequence
from itertools import groupby

from rich.color import Color, blend_rgb
from rich.style import Style
from rich.text import Text

INK = "#16181d"
"""The text colour to put on any colour of the ramp."""

_FILLS = ("#d9f1fb", "#b5ddfb", "#c0c2f5", "#e0a9dd", "#f592b3", "#f97d7e", "#f36a3c")
_LINES = ("#0b7fa8", "#006ecd", "#625acc", "#8e49b4", "#ae358d", "#bb2157", "#b02a0c")
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def depth_colour(depth: int, max_depth: int) -> str:
    """The background of a token read after loop `depth` of 1..`max_depth`, as "#rrggbb".

    Raises ValueError where `depth` is outside 1..`max_depth`.
    """
    return _on_ramp(_FILLS, depth, max_depth)


def depth_line_colour(depth: int, max_depth: int) -> str:
    """The same hue dark enough for lines and text on a white page (contrast of at least 4.5)."""
    return _on_ramp(_LINES, depth, max_depth)


def depth_text(tokens: Sequence[tuple[str, int]], max_depth: int) -> Text:
    """Decoded (text, depth) pairs as one rich text, each on its depth's colour; controls made visible."""
    text = Text()
    for piece, depth in tokens:
        text.append(printable(piece), _style(depth, max_depth))
    return text


def depth_legend(max_depth: int) -> Text:
    """One line that shows the colour of every depth from 1 to `max_depth`."""
    text = Text("depth ")
    for depth in range(1, max_depth + 1):
        text.append(f" {depth} ", _style(depth, max_depth))
    return text


def depth_plain(tokens: Sequence[tuple[str, int]]) -> str:
    """Decoded (text, depth) pairs without colours: a superscript depth closes each run of equal depth.

    [("The", 1), (" quick", 1), (" fox", 4)] is "The quick¹ fox⁴". A mark covers the text back to the
    mark before it and stands before the run's trailing white space.
    """
    shown = [(printable(piece), depth) for piece, depth in tokens if piece]
    runs = ((depth, "".join(piece for piece, _ in run)) for depth, run in groupby(shown, key=lambda pair: pair[1]))
    return "".join(_marked(text, depth) for depth, text in runs)


def printable(text: str) -> str:
    """`text` with control characters (but newline and tab) made visible, so that it cannot drive a terminal.

    Escape becomes "␛"; C1 controls and bidirectional overrides, which have no picture, become "�".
    """
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or (code >= 32 and code != 0x7F and not _is_directive(character)):
        return character
    if code < 32:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "�"


def _is_directive(character: str) -> bool:
    """A C1 control, a lone surrogate, or an override, embedding or isolate of the writing direction."""
    overrides = ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")
    return unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in overrides


def _marked(text: str, depth: int) -> str:
    mark = str(depth).translate(_SUPERSCRIPTS)
    words = text.rstrip()
    # White space alone carries its mark behind it: "foo⁴¹" would read as depth 41.
    return words + mark + text[len(words) :] if words else text + mark


def _style(depth: int, max_depth: int) -> Style:
    return Style(color=INK, bgcolor=depth_colour(depth, max_depth))


def _on_ramp(ramp: Sequence[str], depth: int, max_depth: int) -> str:
    if not 1 <= depth <= max_depth:
        raise ValueError(f"depth {depth} is outside 1..{max_depth}: loops are counted from 1")
    position = (depth - 1) / max(max_depth - 1, 1) * (len(ramp) - 1)
    below = min(int(position), len(ramp) - 2)
    low, high = (Color.parse(colour).get_truecolor() for colour in ramp[below : below + 2])
    return blend_rgb(low, high, position - below).hex
