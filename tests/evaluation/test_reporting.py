"""The page of a model's results: well formed, whole, safe, and legible in a real browser, light and dark."""

import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from looplm.evaluation.frontier_tables import shown
from looplm.evaluation.recipe import Recipe
from looplm.evaluation.reporting import render_page, report_pages
from looplm.evaluation.results import ItemScore, Metric, Result
from looplm.evaluation.saving import save_study, standalone
from looplm.evaluation.tables import Table
from looplm.training.charts import frontier_chart

VOID = {"meta", "input", "br", "link", "img"}
EVIL = "<script>alert(1)</script>"


def recipe(**fields) -> Recipe:
    return Recipe(
        "pipeline & co", "ab" * 32, "float32", 4, **{"task": "x", "command": f"looplm study {EVIL}", **fields}
    )


def frontier() -> dict:
    def point(loops: float, loss: float) -> dict:
        numbers = {"setting": loops / 4, "loops": loops, "loss": 3 + loss, "above_full": loss, "right": 0.3}
        costs = {"processed_loops": loops, "flops": 1e6 * loops, "flops_share": loops / 4}
        return {**numbers, **costs, "above_full_interval": [loss - 0.02, loss + 0.02]}

    names = ("static depth", "q", "untrained gate", "difference", "max_probability", "entropy", "kl")
    curves = {name: [point(1 + n / 2, 0.4 - n / 15) for n in range(7)] for name in names}
    compared = {"curve": "q", "baseline": "static depth", "loops": 2.5, "difference": -0.1, "interval": [-0.2, -0.1]}
    oracles = [{"oracle": name, "loops": 1.4, "right": 0.4, "loss": 3.1} for name in ("agreement", "hindsight")]
    return {
        "curves": curves,
        "comparisons": [compared],
        "windows": 96,
        "tokens": 12_288,
        "oracles": oracles,
        "name": "words",
    }


def write(folder: Path) -> None:
    values = {"text": frontier()}
    save_study(folder / "exit-frontier", "exit-frontier", recipe(), values, *shown(values))
    rule = {"rule": "q", "setting": 0.61, "depth": 2.49, "increase_nats": 0.05}
    table = Table("calibrated", ("rule", "setting"), (("q", "0.61"),), ("a note",))
    save_study(folder, "calibrate", recipe(), {"target": "mean-loops=2.5", "rules": {"q": rule}}, [table], {})
    wide = Table(f"wide {EVIL}", tuple(f"column {n}" for n in range(12)), (tuple("cell" for _ in range(12)),))
    save_study(folder, "perplexity", recipe(task="perplexity"), {}, [wide], {})
    metrics = {"acc,none": Metric(0.53125, 0.02)}
    item = ItemScore("1", "d", None, {"acc,none": 1.0})
    Result(recipe(task="arc_easy"), "arc_easy.loops-4", "arc_easy", metrics, (item,), {"loops_read": 4.0}).save(folder)


class Page(HTMLParser):
    """Checks that tags balance, and keeps the tags and the text outside <style>."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("results")
    write(folder)
    (path,) = report_pages(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_page_stands_alone_and_is_safe(page: str) -> None:
    found = Page(page)
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in found.tags}
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(images) == 2 and all(
        i["src"].startswith("data:image/svg+xml;base64,") and len(i["alt"]) > 40 for i in images
    )
    assert found.text.count(EVIL) >= 3  # as text, in titles and commands


def test_every_result_is_there_in_order(page: str) -> None:
    text = Page(page).text
    places = [text.index(title) for title in ("Tasks", "Loss by loop", "Where to stop", "Calibrated thresholds")]
    assert places == sorted(places)
    for part in (
        "arc_easy",
        "0.5312 ± 0.0200",
        "-0.1000 [-0.2000, -0.1000]",
        "oracle: hindsight",
        "a note",
        "pipeline & co",
    ):
        assert part in text
    assert text.count("Recipe") == 4


def result_of(task: str, group: str, items: int, score: float, **fields) -> Result:
    scores = tuple(ItemScore(str(n), f"{task}{n}", None, {"acc,none": score}) for n in range(items))
    made = recipe(task=task, num_fewshot=5, **fields)
    name = f"{task}.{fields.get('exit_rule', 'loops-4')}-{fields.get('limit')}"
    return Result(made, name, group, {"acc,none": Metric(score, None)}, scores)


def test_the_papers_numbers_stand_beside_those_of_the_same_task(tmp_path: Path) -> None:
    """MMLU's subjects are one number, each weighed by its items: (1 x 90 + 0 x 10) / 100."""
    for part in (
        result_of("mmlu_law", "mmlu", 90, 1.0),
        result_of("mmlu_art", "mmlu", 10, 0.0),
        result_of("mmlu_law", "mmlu", 10, 0.5, exit_rule="q=0.5", exit_mode="freeze"),
        result_of("mmlu_law", "mmlu", 10, 0.25, limit=10),
        result_of("mine", "mine", 10, 1.0),
    ):
        part.save(tmp_path)
    (path,) = report_pages(tmp_path)
    text = path.read_text(encoding="utf-8")
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    rows = [
        [re.sub(r"<.*?>", "", cell) for cell in row] for row in rows if row and re.sub(r"<.*?>", "", row[0]) == "mmlu"
    ]
    assert ["mmlu", "pipeline &amp; co", "4", "90.00", "here: 5 examples"] in rows
    assert ["mmlu", "pipeline &amp; co", "q=0.5 freeze", "50.00", "here: 5 examples"] in rows
    assert ["mmlu", "pipeline &amp; co", "4", "25.00", "here: 5 examples, first 10 items"] in rows
    assert ["mmlu", "Qwen3-4B", "–", "73.19", "Table 7"] in rows and [
        "mmlu",
        "Ouro-1.4B",
        "4",
        "67.45",
        "Table 10",
    ] in rows


def test_the_calibrated_point_is_ringed(page: str) -> None:
    import base64

    images = re.findall(r'base64,([^"]+)"', page)
    first = base64.b64decode(images[0]).decode("utf-8")
    assert "calibrated for mean-loops=2.5: q=0.61" in first and first.count('class="ring"') == 2
    # x: loops 1..4 on 46..372; 2.49 is at 46 + 1.49 / 3 * 326 = 207.9
    assert 'cx="207.9"' in first


def test_models_get_a_page_each(tmp_path: Path) -> None:
    table = Table("t", ("a",), (("b",),))
    save_study(tmp_path / "one", "perplexity", recipe(), {}, [table], {})
    other = Recipe("other", "cd" * 32, "float32", 4)
    save_study(tmp_path / "two", "perplexity", other, {}, [table], {})
    (tmp_path / "notes.json").write_text(json.dumps({"no": "recipe"}))
    (tmp_path / "broken.json").write_text("{")
    pages = report_pages(tmp_path)
    assert [path.name for path in pages] == ["report-pipeline-co-abababab.html", "report-other-cdcdcdcd.html"]
    assert "other" in Page(pages[1].read_text(encoding="utf-8")).text


def test_folders_without_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no results: no JSON file with a recipe"):
        report_pages(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        report_pages(tmp_path / "nowhere")


def test_a_figure_stands_alone() -> None:
    chart = frontier_chart({"static depth": frontier()["curves"]["q"]})
    text = standalone(chart)
    assert (
        text.startswith('<svg xmlns="http://www.w3.org/2000/svg" viewBox="-12 -24 ')
        and "prefers-color-scheme:dark" in text
    )
    assert standalone("") == ""


PROBE = """<!doctype html><html><body>%s<script>
onload = () => {
  const look = frame => {
    const page = frame.contentDocument, root = page.documentElement;
    page.querySelectorAll("details").forEach(d => d.open = true);
    return {
      width: frame.clientWidth, scroll: root.scrollWidth,
      images: [...page.querySelectorAll("img")].map(i => [i.naturalWidth, i.getBoundingClientRect().width]),
      tables: [...page.querySelectorAll(".scroll")].map(t => t.getBoundingClientRect().right),
    };
  };
  document.body.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(look));
};
</script></body></html>"""


def test_a_browser_shows_it_at_any_width(page: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on this machine: the page's layout is not checked")
    frame = '<iframe style="border:0" width="{}" height="900" srcdoc="{}"></iframe>'
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE % "".join(frame.format(width, escape(page)) for width in (360, 1200)), encoding="utf-8")
    quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    command = [browser, "--headless", "--no-sandbox", *quiet.split(), "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probe.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(r"<body>(\[.*\])", dom)
    assert found, dom[:500]
    for seen in json.loads(found[1]):
        assert seen["scroll"] <= seen["width"]
        assert len(seen["images"]) == 2
        assert all(natural > 0 and drawn > 0.8 * min(seen["width"], 400) for natural, drawn in seen["images"])
        assert all(right <= seen["width"] for right in seen["tables"])


def test_rendering_takes_results_as_they_were_read() -> None:
    result = {"study": "faithfulness", "recipe": recipe().as_dict(), "tables": []}
    assert "When the answer is decided" in render_page([(Path("x.json"), result)])
