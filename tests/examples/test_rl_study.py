"""The study of reinforcement learning: its rules hold together, and the report says what the rows say."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from looplm.tuning.rl_recipe import DepthSettings, load_grpo_recipe

ROOT = Path(__file__).parents[2]
RULES = yaml.safe_load((ROOT / "examples" / "rl_study.yaml").read_text("utf-8"))


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import rl_report
    import rl_study

    yield rl_study, rl_report
    for name in ("rl_report", "rl_study"):
        sys.modules.pop(name)


def test_every_question_has_its_section(scripts):
    assert {contrast["question"] for contrast in RULES["contrasts"]} == set(scripts[1].QUESTIONS)


def test_the_rules_hold_together():
    for settings in RULES["arms"].values():
        DepthSettings.validated(settings, "arm")
    assert load_grpo_recipe(ROOT / RULES["grpo"]).held_out.problems >= 1000
    assert len(RULES["seeds"]) >= 5 and RULES["sweep_seed"] not in RULES["seeds"]
    for contrast in RULES["contrasts"]:
        for side in (contrast["left"], contrast["right"]):
            assert side["arm"] in {"sft", *RULES["arms"]}
            assert side.get("loops", 1) in RULES["loops"]


def _measured(outcome: float) -> dict:
    return {"outcome": outcome, "mean_depth": 2.5, "length": 9.0, "outcomes": [outcome], "depths": [2.5]}


def _write_rows(root: Path) -> None:
    """Fixed depth is .2 above SFT at every seed, `per-loop` .1 below it; the other arms have not run."""
    for number, seed in enumerate(RULES["seeds"]):
        for arm, outcome in (("sft", 0.3), ("fixed 4", 0.5), ("per-loop", 0.2)):
            folder = root / f"{arm.replace(' ', '-')}-{seed}"
            folder.mkdir(parents=True)
            value = outcome + 0.01 * number
            row = {"arm": arm, "seed": seed, "own": _measured(value), "agreement": {"token_difference": 1e-5 * seed}}
            row["ignoring_depths"] = None if arm == "fixed 4" else {"mean": 0.1, "largest": seed, "outside_clip": 0.25}
            row["by_loops"] = {str(loops): _measured(value - 0.01 * loops) for loops in RULES["loops"]}
            if arm == "sft":
                row["losses"] = {"before": [1.4, 1.3, 1.35], "after": [0.9, 0.5 + 0.01 * number, 0.8]}
            (folder / "row.json").write_text(json.dumps(row))
            if arm == "fixed 4":
                (folder / "calibrated.json").write_text(json.dumps({"threshold": 0.5, **_measured(value - 0.1)}))


def test_the_report_says_what_the_rows_say(tmp_path, scripts):
    _write_rows(tmp_path / "runs")
    scripts[1].report(RULES, tmp_path / "runs", tmp_path / "rl")
    verdicts = {v["question"]: v for v in json.loads((tmp_path / "rl" / "verdicts.json").read_text())}
    assert set(verdicts) == {2, 4, 5, 6}  # of question 3 there are no rows
    assert verdicts[2]["mean"] == pytest.approx(0.2) and verdicts[2]["verdict"] == "holds"
    assert verdicts[4]["mean"] == pytest.approx(-0.3) and verdicts[4]["verdict"] == "does not hold"
    assert len(verdicts[2]["differences"]) == len(RULES["seeds"])
    assert verdicts[5]["differences"] == pytest.approx([0.25 - 0.01 * n for n in range(len(RULES["seeds"]))])
    page = (tmp_path / "rl.md").read_text()
    assert "| fixed 4 above sft | +0.200 +0.200" in page
    assert "| fixed 4 | 0.510 | 0.500 |" in page  # .5 less .01 a loop, and .02 on average by seed
    assert "| fixed 4, calibrated |  | 0.400 0.410 0.420 0.430 0.440 | 0.420 | 2.50 | 9.0 |" in page
    largest = max(RULES["seeds"])
    assert f"| fixed 4 | {1e-5 * largest:.1e} |  |" in page
    assert f"| per-loop | {1e-5 * largest:.1e} | 0.100, {largest:.2f} nats, 25.0% |" in page
    for question in range(1, 7):
        assert f"## {question}. " in page
    for figure in ("outcome", "loops", "sweep", "losses"):
        assert (tmp_path / "rl" / f"{figure}.svg").read_text().startswith("<svg")
    rows = json.loads((tmp_path / "rl" / "rows.json").read_text())
    assert "outcomes" not in rows[0]["own"] and rows[0]["own"]["outcome"] == 0.3
