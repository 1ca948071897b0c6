"""The trace's page: stands alone, escapes everything, shows every number, and works in a real browser."""

import json
import re
import shutil
import subprocess
from base64 import b64encode
from hashlib import sha256
from html import escape, unescape
from html.parser import HTMLParser

import pytest
import torch
from tiny import tiny_model

from looplm.data.tokenizers import train_bpe
from looplm.model.trace_page import _split, trace_page
from looplm.model.tracing import Candidate, LoopReading, TokenTrace, Trace, trace

TOKENIZER = train_bpe(["the loop goes round and round, and the gate opens at loop four. " * 3, "naïve ☃"], 300)
TEXT = (
    "The loop goes round,\n\n\tand the gate <b>opens</b> & </script><script>alert(1)</script> naïvely ☃ 🦊"
    + " word" * 40
)
THRESHOLDS = (0.01, 0.3, 0.55, 0.8, 1.0)
EVIL = "</script><!--<script>alert(1)</script>\"'\x1b&"


@pytest.fixture(scope="module")
def found():
    model = tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=512)
    with torch.no_grad():
        model.model.early_exit_gate.weight.mul_(0.3)  # depths of every kind at one threshold
    return trace(model, TOKENIZER, TEXT, top_k=3)


class Page(HTMLParser):
    """Checks that tags balance; keeps tags, buttons with their depth, cells and scripts."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.scripts, self.cells, self.buttons = [], [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("meta", "input"):
            return
        self.open.append(tag)
        kept = {"script": self.scripts, "td": self.cells, "button": self.buttons}.get(tag)
        if kept is not None:
            kept.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag, kept in (("script", self.scripts), ("td", self.cells), ("button", self.buttons)):
            if tag in self.open:
                kept[-1] += data


def test_the_page_stands_alone_and_allows_its_own_script_only(found):
    html = trace_page(found, "a model")
    page = Page(html)
    assert html.startswith("<!doctype html>") and ("html", {"lang": "en"}) in page.tags
    assert not re.search(r"https?://|@import|url\(", html)
    assert not {"link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name in ("src", "href", "style")]
    (policy,) = (attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    data, script = page.scripts
    digest = b64encode(sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert len(json.loads(data)["tokens"]) == len(found.tokens)


def test_without_its_script_it_shows_the_text_the_depths_and_the_tables(found):
    page = Page(trace_page(found, "a model", 0.55))
    tokens = [attributes for tag, attributes in page.tags if tag == "button" and "token" in attributes.get("class", "")]
    assert [int(token["class"].removeprefix("token d")) for token in tokens] == found.exit_depths(0.55)
    assert len(set(found.exit_depths(0.55))) == 3
    assert [token["tabindex"] for token in tokens] == ["0"] + ["-1"] * (len(tokens) - 1)
    body = re.search(r'<div class="text"[^>]*>(.*?)</div>', trace_page(found, "m"), re.S)[1]
    shown = unescape(re.sub(r"<[^>]*>", "", body))
    assert re.sub(r"[\s␣▫↵⇥]", "", shown) == re.sub(r"\s", "", TEXT)
    names = ("next_loss", "entropy", "kl_to_final", "hazard", "exit_probability", "change", "cosine")
    depths = found.exit_depths(0.55)
    expected = []
    for loop in range(3):
        expected.append(f"{depths.count(loop + 1) / len(depths):.0%}")
        expected += ["–" if (v := found.mean(name)[loop]) is None else f"{v:.3f}" for name in names]
    expected += [f"{value:.3f}" for row in found.cka for value in row]
    assert page.cells == expected


def test_everything_written_by_a_model_or_a_user_is_escaped():
    reading = LoopReading((Candidate(1, EVIL, 0.5),), 0.0, 0.5, 1.0, 1.0, 0.0, None, None, None)
    html = trace_page(Trace((TokenTrace(1, EVIL, (reading,)),), ((None,),), 1), EVIL)
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 2 and "\x1b" not in html
    assert page.buttons[0] == EVIL.replace("\x1b", "␛")
    assert json.loads(page.scripts[0])["tokens"][0]["loops"][0]["top"][0][0].startswith("</script><!--<script>")
    assert page.cells[:2] == ["100%", "–"]


@pytest.mark.parametrize(
    ("piece", "parts"),
    [
        (" the", (" ", "the", "")),
        ("the", ("", "the", "")),
        ("", ("", "▫", "")),
        (" ", ("", "␣", "")),
        ("\n\n", ("", "↵↵", "\n\n")),
        (" \n\t", ("", "␣↵⇥", "\n")),
        (".\n", ("", ".", "\n")),
        ("a b\nc", ("", "a␣b↵c", "")),
    ],
)
def test_white_space_stands_outside_the_button_or_shows_as_signs(piece, parts):
    assert _split(piece) == parts


def test_a_threshold_out_of_range_is_refused(found):
    with pytest.raises(ValueError, match="threshold is 2"):
        trace_page(found, "m", 2)


PROBE = """<!doctype html><html><body>%s<script>
onload = () => {
  const look = frame => {
    const page = frame.contentDocument, window = frame.contentWindow, root = page.documentElement;
    const tokens = [...page.querySelectorAll(".token")], slider = page.getElementById("threshold");
    const panel = page.getElementById("panel"), shown = name => page.getElementById(name).textContent;
    const set = value => { slider.value = value; slider.dispatchEvent(new window.Event("input")); };
    const press = (target, key) => target.dispatchEvent(new window.KeyboardEvent("keydown", {key, bubbles: true}));
    const depths = () => tokens.map(token => Number(token.className.replace("token d", "")));
    const result = {width: frame.clientWidth, closed: window.getComputedStyle(panel).display};
    result.depths = %s.map(q => { set(q); return [depths(), shown("mean"), shown("asked"),
      [...page.querySelectorAll(".share")].map(cell => cell.textContent)]; });
    set(0.55);
    tokens[3].click();
    result.heading = shown("which") + "|" + shown("where") + shown("following");
    result.label = tokens[3].getAttribute("aria-label");
    result.cards = [...page.querySelectorAll(".card")].map(card => ({
      title: card.querySelector("h4").textContent,
      top: [...card.querySelectorAll("li")].map(item => [...item.children].map(child => child.textContent)),
      bars: [...card.querySelectorAll(".bar")].map(bar => bar.getBoundingClientRect().width),
      numbers: [...card.querySelectorAll("dd")].map(number => number.textContent)}));
    result.box = panel.getBoundingClientRect().toJSON();
    result.scroll = root.scrollWidth;
    const state = () => [shown("where").split(",")[0], tokens.indexOf(page.activeElement),
      tokens.findIndex(t => t.getAttribute("aria-pressed") === "true"), tokens.findIndex(t => t.tabIndex === 0)];
    result.moves = ["ArrowRight", "End", "ArrowDown", "ArrowLeft", "Home", "ArrowUp"].map(key => {
      press(tokens[Math.max(tokens.findIndex(t => t.tabIndex === 0), 0)], key); return state(); });
    press(page.body, "Escape");
    result.escaped = [...state(), panel.classList.contains("open")];
    const mark = () => window.getComputedStyle(tokens[0], "::after").content;
    result.marks = [mark(), (page.getElementById("marks").click(), mark())];
    result.letters = tokens.map(token => token.getBoundingClientRect()).map(box => [box.left, box.right, box.height]);
    return result;
  };
  document.body.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(look));
};
</script></body></html>"""


@pytest.fixture(scope="module")
def seen(found, tmp_path_factory):
    """What a real browser shows in frames of 360 and 1200 pixels."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on this machine: the page's layout is not checked")
    folder = tmp_path_factory.mktemp("browser")
    frame = '<iframe style="border:0" width="{}" height="800" srcdoc="{}"></iframe>'
    page = escape(trace_page(found, "a/very/long/" + "name" * 40))
    probe = folder / "probe.html"
    frames = frame.format(360, page) + frame.format(1200, page)
    probe.write_text(PROBE % (frames, list(THRESHOLDS)), encoding="utf-8")
    quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    command = [browser, "--headless", "--no-sandbox", *quiet.split(), "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", probe.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    body = re.search(r"<body>(\[.*\])</body>", dom, re.S)
    assert body, dom[-2000:]
    return json.loads(unescape(body[1]))


def test_a_browser_colours_the_text_as_the_models_rule_does(seen, found):
    for frame in seen:
        for threshold, (depths, mean, asked, shares) in zip(THRESHOLDS, frame["depths"], strict=True):
            expected = found.exit_depths(threshold)
            assert depths == expected
            assert mean == f"{sum(expected) / len(expected):.2f}" and float(asked) == threshold
            counts = [100 * expected.count(loop) / len(expected) for loop in (1, 2, 3)]
            assert [int(share.removesuffix("%")) for share in shares] == pytest.approx(counts, abs=0.51)


def test_a_browser_opens_a_token(seen, found):
    token, following = found.tokens[3], found.tokens[4]
    depth = found.exit_depths(0.55)[3]
    for frame in seen:
        name = token.text.replace(" ", "␣")
        assert frame["heading"] == (
            f"{name}|Token 4 of {len(found.tokens)}, exits after loop {depth}; the next token is "
            + following.text.replace(" ", "␣")
        )
        assert frame["label"] == f"{name.strip('␣')}, depth {depth}"
        for loop, (card, reading) in enumerate(zip(frame["cards"], token.loops, strict=True), start=1):
            assert card["title"] == f"Loop {loop}" + "exits here" * (loop == depth)
            for (text, _, percent), best in zip(card["top"], reading.top, strict=True):
                assert text.removesuffix("next").replace("␣", " ").strip() == best.text.strip() or "�" in text
                assert float(percent.removesuffix(" %")) == pytest.approx(100 * best.probability, abs=0.06)
            assert card["bars"] == sorted(card["bars"], reverse=True)
            assert card["numbers"][1] == f"{reading.entropy:.3f}" and len(card["numbers"]) == 7


def test_a_browser_lays_the_panel_out_for_the_width(seen):
    narrow, wide = seen
    assert (narrow["width"], wide["width"]) == (360, 1200)
    assert (narrow["closed"], wide["closed"]) == ("none", "block")
    for frame in seen:
        assert frame["scroll"] <= frame["width"]
        outside = [box for box in frame["letters"] if not (0 <= box[0] <= box[1] <= frame["width"] and box[2] > 15)]
        assert outside == []
    assert narrow["box"]["width"] == 360 and narrow["box"]["height"] <= 0.57 * 800
    assert narrow["box"]["bottom"] <= 801
    assert wide["box"]["left"] > 500


def test_a_browser_moves_by_keys_and_closes_by_escape(seen, found):
    last = len(found.tokens) - 1
    for frame in seen:
        places = [4, last, last, last - 1, 0, 0]
        assert frame["moves"] == [[f"Token {n + 1} of {last + 1}", n, n, n] for n in places]
        assert frame["escaped"] == [f"Token 1 of {last + 1}", 0, -1, 0, False]


def test_a_browser_adds_depths_as_numbers_without_scripts(seen, found):
    for frame in seen:
        assert frame["marks"] == ["none", f'"{found.exit_depths(0.55)[0]}"']
