import copy
import json
import math
import random
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser

import pytest

from looplm.training.report import render_report, save_report

LOOPS = 4
VOID = {"meta", "input", "br", "link"}


def history(steps):
    noise = random.Random(0)
    for step in range(1, steps + 1):
        loss = 4.0 + 6 * math.exp(-step / 100) + noise.gauss(0, 0.05)
        weights = [math.exp(math.sin(loop + step / 900)) for loop in range(LOOPS)]
        probabilities = [weight / sum(weights) for weight in weights]
        yield {
            "step": step,
            "minutes": step / 200,
            "tokens": step * 8192,
            "learning_rate": 3e-4,
            "exit_beta": 0.05,
            "loss": loss,
            "loop_losses": [loss + 0.5 * math.exp(-loop) for loop in range(LOOPS)],
            "exit_probabilities": probabilities,
            "expected_depth": sum(p * (i + 1) for i, p in enumerate(probabilities)),
            "grad_norm": 1.0,
        }


def generation(threshold, prompts):
    noise = random.Random(threshold)
    texts = [[{"text": " <b>word", "depth": noise.randint(1, LOOPS)} for _ in range(80)] for _ in range(prompts)]
    rows = [{"prompt": "To be & not", "tokens": tokens, "mean_depth": 2.25} for tokens in texts]
    return {"target_depth": 2.5, "threshold": threshold, "mean_depth": 2.375, "prompts": rows}


def stage(number, loops):
    losses = [3.9 + 0.6 / loop for loop in range(1, loops + 3)]
    shape = {"layers": 4, "loops": loops, "sequence_length": 128 * number, "tokens": 300_000 * number}
    return {"stage": number, "name": f"stage-name-{number}", **shape, "final": {"losses": losses}}


def gate_stage():
    def point(loops, loss):
        ends = [loss - 0.02, loss + 0.02]
        known = {"setting": 0.5, "loops": loops, "loops_interval": ends, "loss": 4 + loss, "loss_interval": ends}
        return {**known, "above_full": loss, "above_full_interval": ends}

    curves = {
        name: [point(1.2, 0.4 + shift), point(2.5, 0.1 + shift), point(3.9, 0.0)]
        for name, shift in (("static depth", 0.1), ("Stage I gate", 0.05), ("Stage II lookahead", 0.0))
    }
    compared = {"curve": "Stage II lookahead", "baseline": "static depth", "loops": 2.5, "difference": -0.1}
    fit = {"loss_before": 0.7, "loss_after": 0.6, "hazards_before": [0.25] * LOOPS, "hazards_after": [0.4] * LOOPS}
    frontier = {"curves": curves, "windows": 96, "tokens": 9_000}
    frontier["comparisons"] = [{**compared, "interval": [-0.12, -0.08]}, {**compared, "interval": [-0.2, 0.1]}]
    return {"fits": {"published": fit, "lookahead": fit}, "frontier": frontier}


def make_report(steps=60, prompts=2):
    rows = list(history(steps))
    return {
        "title": "Looped & small",
        "created": "2026-03-04T10:11:12+00:00",
        "command": "looplm demo --minutes 12 --a-long-option " + "x" * 200,
        "recipe": {"name": "laptop", "model": {"loops": LOOPS}, "stages": [{"steps": 2000}]},
        "model": {"parameters": 7_340_161, "layers": 4, "loops": LOOPS, "width": 256, "vocabulary": 4096},
        "data": {
            "sources": ["shakespeare", "a" * 90],
            "train_tokens": 1_203_344,
            "validation_tokens": 61_002,
            "train_documents": 37,
            "validation_documents": 5,
            "validation_characters": 201_332,
        },
        "training": {"steps": steps, "tokens": steps * 8192, "minutes": 12.34, "compiled": False, "autocast": None},
        "history": rows,
        "evaluations": rows[:: max(steps // 10, 1)],
        "loops": [
            {
                "loop": loop,
                "loss": 3.9 + 0.6 / loop + 0.2 * (loop > LOOPS),
                "bits_per_character": 2.0 + 0.3 / loop + 0.1 * (loop > LOOPS),
                "exit_probability": 0.2 + loop / 100 if loop <= LOOPS else None,
            }
            for loop in range(1, LOOPS + 3)
        ],
        "stages": [stage(1, LOOPS), stage(2, 2)],
        "gates": {"the gate": gate_stage()},
        "warnings": [{"stage": "stage-name-1", "step": 7, "text": "source <docs> begins epoch 2"}],
        "expected_depth": 2.413,
        "generations": [generation(threshold, prompts) for threshold in (0.25, 0.5, 0.9)],
    }


class Page(HTMLParser):
    """Checks that tags balance, and keeps the tags, the text outside <style>, and the table's cells."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text, self.cells, self.ids = [], [], "", [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if "td" in self.open:
            self.cells[-1] += data


def test_the_page_is_well_formed_and_stands_alone():
    html = render_report(make_report())
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert ("html", {"lang": "en"}) in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name in ("src", "href", "style")]


def test_it_is_accessible():
    page = Page(render_report(make_report()))
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(charts) == 6  # losses, exits, the frontier, and the depths of three thresholds
    assert all(chart["role"] == "img" and len(chart["aria-label"]) > 20 for chart in charts)
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in page.tags if tag == "th")
    labelled = {attributes["for"] for tag, attributes in page.tags if tag == "label"}
    assert labelled == {attributes["id"] for tag, attributes in page.tags if tag == "input"}


def test_every_number_of_the_table_is_shown():
    report = make_report()
    page = Page(render_report(report))
    expected = []
    for row in report["loops"]:
        expected += [f"{row['loss']:.3f}", f"{row['bits_per_character']:.3f}"]
        expected.append("–" if row["exit_probability"] is None else f"{row['exit_probability']:.3f}")
    assert page.cells[: len(expected)] == expected
    assert page.text.count("beyond training") == 2
    assert "reading after loop 4" in page.text
    for number in (
        "2.075",
        "7.34M",
        "492k",
        "12.3",
        "2.413",
        "7,340,161",
        "201,332",
        "mean depth 2.38, aiming at 2.50",
    ):
        assert number in page.text
    assert "stages:\n- steps: 2000" in page.text


def test_everything_written_by_a_model_or_a_user_is_escaped():
    evil = "<script>alert(1)</script>\"'\x1b[31m&"
    report = make_report(steps=3, prompts=1)
    report |= {"title": evil, "command": evil, "created": evil, "recipe": {evil: evil}}
    report["data"]["sources"] = [evil]
    report["generations"][0]["prompts"][0] |= {"prompt": evil, "tokens": [{"text": evil, "depth": 1}]}
    html = render_report(report)
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "\x1b" not in html
    assert page.text.count("<script>alert(1)</script>\"'␛[31m&") >= 5


def test_the_stages_the_gates_and_the_warnings_are_told():
    page = Page(render_report(make_report()))
    for text in ("4 × 2", "256", "4.200", "4.100*", "stage-name-1, step 7: source <docs> begins epoch 2"):
        assert text in page.text
    assert page.text.count("Stage II lookahead") >= 3 and "-0.1200 to -0.0800" in page.text
    assert [cell for cell in page.cells if cell in ("better", "worse", "level")] == ["better", "level"]
    assert "0.40 0.40 0.40" in page.text
    assert "Stage by stage" not in render_report({**make_report(), "stages": [stage(1, 2)]})


def test_newlines_stand_behind_their_token_and_lone_ones_are_seen():
    report = {"generations": [{"threshold": 0.5, "prompts": [{"tokens": []}]}]}
    report["generations"][0]["prompts"][0]["tokens"] = [{"text": " a\n", "depth": 1}, {"text": "\n\n", "depth": 2}]
    html = render_report(report)
    assert '<span class="token d1"> a</span>\n<span class="token d2">↵↵</span>\n\n</p>' in html


@pytest.mark.parametrize("missing", list(make_report(2, 1)))
@pytest.mark.parametrize("empty", [True, False])
def test_any_part_may_be_missing(missing, empty):
    report = make_report(2, 1)
    if empty:
        report[missing] = type(report[missing])()
    else:
        del report[missing]
    Page(render_report(report))


def test_an_empty_report_and_one_full_of_nan_still_render():
    Page(render_report({}))

    def spoil(value):
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        if isinstance(value, list):
            return [spoil(item) for item in value]
        return math.nan if isinstance(value, float) else value

    html = render_report(spoil(make_report(5, 1)))
    Page(html)
    assert "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.S).lower()


def test_a_long_run_is_a_small_file(tmp_path):
    report = make_report(steps=3000, prompts=4)
    path = save_report(tmp_path / "run", report)
    assert path == tmp_path / "run" / "report.html"
    assert path.stat().st_size < 500_000
    curves = re.findall(r'class="curve d\d" d="([^"]+)"', path.read_text(encoding="utf-8"))
    assert [curve.count("L") + 1 for curve in curves] == [300] * LOOPS
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) == report
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json"]


def test_rendering_leaves_the_report_alone():
    report = make_report(5, 1)
    before = copy.deepcopy(report)
    render_report(report)
    assert report == before


PROBE = """<!doctype html><html><body>%s<script>
onload = () => {
  const look = frame => {
    const page = frame.contentDocument, root = page.documentElement;
    page.querySelectorAll("details").forEach(d => d.open = true);
    const token = page.querySelector(".token");
    const mark = () => frame.contentWindow.getComputedStyle(token, "::after").content;
    const before = mark();
    page.getElementById("marks").click();
    return {
      width: frame.clientWidth, scroll: root.scrollWidth, before, after: mark(), depth: token.className,
      charts: [...page.querySelectorAll("svg")].map(s => s.getBoundingClientRect().width),
      letters: [...page.querySelectorAll("svg text")].map(t => {
        const box = t.getBoundingClientRect(); return [box.left, box.right, box.height]; }),
    };
  };
  document.body.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(look));
};
</script></body></html>"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What a real browser measures in frames of 360 and 1280 pixels, folds open."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on this machine: the page's layout is not checked")
    folder = tmp_path_factory.mktemp("browser")
    page = escape(render_report(make_report(300, 2)))
    frame = '<iframe style="border:0" width="{}" height="900" srcdoc="{}"></iframe>'
    probe = folder / "probe.html"
    probe.write_text(PROBE % (frame.format(360, page) + frame.format(1280, page)), encoding="utf-8")
    quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    command = [browser, "--headless", "--no-sandbox", *quiet.split(), "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", probe.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(r"<body>(\[.*\])", dom)
    assert found, dom[:500]
    return json.loads(found[1])


def test_a_browser_needs_no_sideways_scrolling(seen):
    assert [frame["width"] for frame in seen] == [360, 1280]
    for frame in seen:
        assert frame["scroll"] <= frame["width"]


def test_a_browser_shows_charts_with_legible_letters(seen):
    for frame in seen:
        assert len(frame["charts"]) == 6
        assert min(frame["charts"]) > 120
        for left, right, height in frame["letters"]:
            assert 0 <= left <= right <= frame["width"]
            assert height >= 9


def test_a_browser_adds_depths_as_numbers_without_scripts(seen):
    for frame in seen:
        assert frame["before"] == "none"
        assert frame["after"] == '"' + frame["depth"].removeprefix("token d") + '"'
