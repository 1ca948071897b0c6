"""A trace as one page: the text coloured by depth at a threshold the reader moves, and what each loop read of a token.

`trace_page` gives one HTML file without outside resources. The text and the tables are written here and need no
script; the slider and the panel are trace.js, allowed by its hash, over the trace's numbers as inert JSON.
"""

import json
from base64 import b64encode
from hashlib import sha256
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from looplm.display import depth_colour, depth_line_colour, printable
from looplm.model.tracing import MEASURES, LoopReading, Trace

_MISSING = "–"
_SIGNS = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})
_WORD = 18
"""Characters and tokens that are kept on one line, so that it fits a phone; longer runs may break between tokens."""


def trace_page(trace: Trace, title: str, threshold: float = 0.5) -> str:
    """The page of a trace as HTML text.

    Args:
        title: what was traced, the model's name for instance.
        threshold: where the reader's slider starts, in (0, 1].

    Raises:
        ValueError: a threshold outside (0, 1].
    """
    depths = trace.exit_depths(threshold)
    folder = Path(__file__).parent
    script = (folder / "trace.js").read_text(encoding="utf-8")
    beyond = "" if trace.loops <= trace.trained_loops else f", trained with {trace.trained_loops}"
    return Template((folder / "trace.html").read_text(encoding="utf-8")).substitute(
        title=_text(title),
        subtitle=f"{len(trace.tokens):,} tokens, {trace.loops} loops{beyond}",
        hash=b64encode(sha256(script.encode("utf-8")).digest()).decode("ascii"),
        palette=_palette(trace.loops),
        threshold=f"{threshold:g}",
        mean=f"{sum(depths) / len(depths):.2f}",
        legend="".join(f'<li class="d{loop}">{loop}</li>' for loop in range(1, trace.loops + 1)),
        text=_words(trace, depths),
        table=_table(trace, depths),
        cka=_cka(trace),
        data=_data(trace),
        script=script,
    )


def _text(value: str) -> str:
    return escape(printable(value))


def _palette(loops: int) -> str:
    """One class a depth: `--fill` behind dark text, `--line` for lines, which on a dark page is the fill."""
    numbers = range(1, loops + 1)
    light = "".join(f".d{n}{{--fill:{depth_colour(n, loops)};--line:{depth_line_colour(n, loops)}}}" for n in numbers)
    dark = "".join(f".d{n}{{--line:{depth_colour(n, loops)}}}" for n in numbers)
    marks = "".join(f'#marks:checked~.reader .token.d{n}::after{{content:"{n}"}}' for n in numbers)
    forced = "".join(f'.token.d{n}::after{{content:"{n}"}}' for n in numbers)
    return f"{light}\n@media(prefers-color-scheme:dark){{{dark}}}\n{marks}\n@media(forced-colors:active){{{forced}}}"


def _words(trace: Trace, depths: list[int]) -> str:
    """The text: a button a token with white space between them, the tokens of one word kept on a line."""
    parts: list[str] = []
    length = 0  # of the open word; 0 where none is open
    for place, (token, depth) in enumerate(zip(trace.tokens, depths, strict=True)):
        before, shown, behind = _split(token.text)
        size = len(shown) + 1
        if length and (before or length + size > _WORD):
            parts.append("</span>")
            length = 0
        parts += [_text(before), "" if length else '<span class="word">', _button(shown, depth, place == 0)]
        length += size
        if behind:
            parts += ["</span>", behind]
            length = 0
    return "".join(parts) + "</span>" * bool(length)


def _button(shown: str, depth: int, first: bool) -> str:
    """A token; Tab comes to the first one, arrow keys go on from there."""
    return (
        f'<button type="button" class="token d{depth}" tabindex="{0 if first else -1}" aria-pressed="false" '
        f'aria-label="{_text(shown)}, depth {depth}">{_text(shown)}</button>'
    )


def _split(piece: str) -> tuple[str, str, str]:
    """White space before a token, what its button shows, and line breaks behind; white space alone shows as signs."""
    core = piece.strip(" \n\t")
    if not core:
        return "", piece.translate(_SIGNS) or "▫", "\n" * piece.count("\n")
    start = piece.index(core)
    return piece[:start], core.translate(_SIGNS), piece[start + len(core) :]


def _number(value: float | None, form: str = ".3f") -> str:
    return _MISSING if value is None else format(value, form)


def _swatch(loop: int) -> str:
    return f'<span class="swatch d{loop}" aria-hidden="true"></span>{loop}'


def _table(trace: Trace, depths: list[int]) -> str:
    """Means over the text, a row a loop, and how many tokens exit there at the threshold."""
    columns = [trace.mean(name) for name in MEASURES]
    rows = []
    for loop in range(1, trace.loops + 1):
        tag = '<span class="tag">beyond training</span>' if loop > trace.trained_loops else ""
        cells = "".join(f"<td>{_number(column[loop - 1])}</td>" for column in columns)
        share = f'<td class="share">{depths.count(loop) / len(depths):.0%}</td>'
        rows.append(f'<tr><th scope="row">{_swatch(loop)}{tag}</th>{share}{cells}</tr>')
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("Loop", "Exits", *MEASURES.values()))
    return f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"


def _cka(trace: Trace) -> str:
    """The table of CKA, shaded from its least value to 1."""
    known = [value for row in trace.cka for value in row if value is not None]
    low = min(known, default=1.0)
    rows = []
    for loop, values in enumerate(trace.cka, start=1):
        levels = (0 if value is None or low == 1 else round(9 * (value - low) / (1 - low)) for value in values)
        cells = "".join(f'<td class="c{n}">{_number(v)}</td>' for v, n in zip(values, levels, strict=True))
        rows.append(f'<tr><th scope="row">{_swatch(loop)}</th>{cells}</tr>')
    heads = "".join(f'<th scope="col">{_swatch(loop)}</th>' for loop in range(1, trace.loops + 1))
    return f'<thead><tr><th scope="col">Loop</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody>'


def _data(trace: Trace) -> str:
    """What the script shows, as JSON that cannot end its element."""
    tokens = [
        {"text": _shown(token.text), "loops": [_reading(reading, following) for reading in token.loops]}
        for token, following in zip(trace.tokens, [*(token.id for token in trace.tokens[1:]), None], strict=True)
    ]
    text = json.dumps({"trained": trace.trained_loops, "tokens": tokens}, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _shown(text: str) -> str:
    """A token's text with its white space as signs."""
    return printable(text.translate(_SIGNS)) or "▫"


def _reading(reading: LoopReading, following: int | None) -> dict[str, Any]:
    """A reading for the panel: best tokens (text, probability, whether it is the next one) and numbers as shown."""
    best = [[_shown(one.text), round(one.probability, 4), one.id == following] for one in reading.top]
    return {
        "top": best,
        "gate": reading.gate_logit,
        "numbers": [[label, _number(getattr(reading, name))] for name, label in MEASURES.items()],
    }
