"""Verdicts from made-up runs, and the age of claims in a real repository."""

import json
import math
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest
import yaml

from looplm.lab.ledger import committed, judge, strangers
from looplm.lab.report import ledger_table, write_ledger
from tests.lab.ledgers import claim, results

OLD = {"made-up": 1_000, "other": 1_000}


def judged(made, scores, ages=OLD, quick=False, **changes):
    return judge([made], results(made, scores, **changes), ages, quick)[0]


def seeds(mean):
    return [mean + 0.01 * (place - 3.5) for place in range(8)]


@pytest.mark.parametrize(
    ("two", "one", "verdict"),
    [
        (seeds(0.8), [0.5] * 8, "reproduced"),
        (seeds(0.55), [0.5] * 8, "in direction"),  # above 0 but not above the margin of 0.1
        (seeds(0.4), [0.5] * 8, "not reproduced"),
        ([0.5, 1.0] * 4, [0.51] * 8, "in direction"),  # 0.24 on average, but seeds do not agree
        ([0.0, 1.0] * 4, [0.3] * 8, "not reproduced"),  # 0.2 on average, and the interval holds 0
    ],
)
def test_a_difference_is_judged_by_its_margin_and_its_seeds(two, one, verdict):
    entry = judged(claim(), {"two": two, "one": one})
    assert entry.verdict == verdict and entry.exploratory == "" and entry.missing == 0
    assert (entry.because == "") == (verdict == "reproduced")
    (finding,) = entry.findings
    assert finding.mean == pytest.approx(sum(two) / 8 - sum(one) / 8)
    assert finding.low <= finding.mean <= finding.high
    assert entry.runs == 16 and entry.flops == 16e9


@pytest.mark.parametrize(
    ("two", "verdict"),
    [
        ([0.5 + 0.01 * (-1) ** place for place in range(8)], "reproduced"),
        ([0.5 + 0.2 * (-1) ** place for place in range(8)], "in direction"),
        ([0.6] * 8, "not reproduced"),
    ],
)
def test_no_difference_is_a_claim_about_a_margin(two, verdict):
    made = claim(contrasts=[{"left": {"arm": "two"}, "right": {"arm": "one"}, "kind": "equal", "margin": 0.05}])
    assert judged(made, {"two": two, "one": [0.5] * 8}).verdict == verdict


def test_seeds_are_paired():
    apart = [0.1 * place for place in range(8)]
    entry = judged(claim(), {"two": [value + 0.2 for value in apart], "one": apart})
    assert entry.verdict == "reproduced"  # unpaired, the spread of the seeds would hide it


def test_the_weakest_contrast_decides():
    both = [
        {"left": {"arm": "two"}, "right": {"arm": "one"}, "margin": 0.1},
        {"left": {"arm": "one"}, "right": {"arm": "two"}, "margin": 0.0},
    ]
    entry = judged(claim(contrasts=both), {"two": seeds(0.8), "one": [0.5] * 8})
    assert [finding.points for finding in entry.findings] == [True, False]
    assert entry.verdict == "not reproduced" and entry.because.startswith("one > two (-0.300, p ")
    assert entry.p == entry.findings[1].p > entry.findings[0].p


def test_the_correction_is_over_the_whole_ledger_runs_still_to_come_included():
    made, scores = claim(), {"two": seeds(0.8), "one": [0.5] * 8}
    alone = judged(made, scores)
    others = [claim(name=f"other-{n}", settings={"task": "mano", "steps": 10 + n}) for n in range(99)]
    ages = {one.name: 1_000 for one in (made, *others)}
    among = judge([made, *others], results(made, scores), ages)
    assert among[0].p == pytest.approx(100 * alone.p) and alone.p == alone.findings[0].p
    assert (alone.verdict, among[0].verdict) == ("reproduced", "in direction")
    assert among[0].because.startswith("corrected over the ledger p is 0.08")
    assert among[1].verdict == "not run yet" and "16 runs are missing" in among[1].because and among[1].p == 1


def test_a_task_that_nobody_learns_tells_nothing():
    made = claim(testable={"arm": "two", "at_least": 0.5})
    entry = judged(made, {"two": seeds(0.3), "one": [0.1] * 8})
    assert entry.verdict == "not testable at this scale"
    assert entry.because == "two reaches 0.300; 0.5 was set as the least"


def test_a_loss_that_is_no_number_stops_its_claim_and_no_other(tmp_path):
    made = claim(contrasts=[{"left": {"arm": "two", "measure": "loss"}, "right": {"arm": "one"}, "margin": 0.1}])
    fine = claim(name="other", settings={"task": "mano", "steps": 10})
    runs = results(made, {"two": [0.9] * 7 + [math.nan], "one": [0.5] * 8}) | results(
        fine, {"two": seeds(0.8), "one": [0.5] * 8}
    )
    broken, other = judge([made, fine], runs, OLD)
    assert (broken.verdict, broken.p) == ("not testable at this scale", 1.0) and other.verdict == "reproduced"
    assert broken.because == "a run of two (loss) > one diverged"
    write_ledger([broken, other], runs, tmp_path, "looplm lab claims")
    assert "| two (loss) > one | above 0.1 | | | diverged |" in (tmp_path / "claims.md").read_text()


def test_claims_that_cannot_be_run_yet_say_why():
    made = claim(waiting="no exit rules yet", arms={}, contrasts=[])
    entry = judge([made], {}, OLD)[0]
    assert (entry.verdict, entry.because, entry.exploratory) == ("not run yet", "no exit rules yet", "")


@pytest.mark.parametrize(
    ("ages", "changes", "said"),
    [
        ({"made-up": 2_001}, {}, "committed or changed after its first run began"),
        ({"made-up": "not committed"}, {}, "not committed"),
        (OLD, {"commit": "0123456789ab-dirty"}, "ran code that was not committed"),
        (OLD, {"commit": "unknown"}, "ran code that was not committed"),
        (OLD, {}, ""),
        ({"made-up": 2_000}, {}, ""),
    ],
)
def test_what_makes_a_claim_exploratory(ages, changes, said):
    entry = judged(claim(), {"two": seeds(0.8), "one": [0.5] * 8}, ages, **changes)
    assert entry.verdict == "reproduced"
    assert said in entry.exploratory and bool(entry.exploratory) == bool(said)


def test_short_runs_need_eight_seeds():
    made, scores = claim(seeds=[1, 2, 3, 4, 5]), {"two": seeds(0.8), "one": [0.5] * 8}
    assert "which need 8" in judged(made, scores).exploratory
    assert judged(made, scores, cpu_seconds=121.0).exploratory == ""
    assert judged(made, scores, quick=True).exploratory == "the reduced ledger"


def test_runs_of_a_claim_as_it_was_are_strangers():
    made = claim()
    runs = results(made, {"two": seeds(0.8), "one": [0.5] * 8})
    edited = claim(settings={"task": "p-hop", "steps": 11})
    assert strangers(judge([made], runs, OLD), runs) == 0
    assert strangers(judge([edited], runs, OLD), runs) == 16


def git(folder, *arguments, time="@1000 +0000"):
    environment = {"GIT_COMMITTER_DATE": time, "GIT_AUTHOR_DATE": time, "HOME": str(folder), "PATH": "/usr/bin:/bin"}
    identity = ["-c", "user.name=Nobody", "-c", "user.email=nobody@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True, env=environment)


def test_the_age_of_a_claim_is_that_of_its_own_entry(tmp_path):
    path = tmp_path / "claims.yaml"

    def write(**statements):
        path.write_text(yaml.safe_dump({"claims": [{"name": n, "statement": s} for n, s in statements.items()]}))

    write(first="a")
    assert "not in git" in committed(path)["first"]
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one", time="@1000 +0000")
    assert committed(path) == {"first": 1000}
    write(first="a", second="b")
    assert committed(path) == {"first": 1000, "second": "its entry in claims.yaml is not committed"}
    git(tmp_path, "commit", "-qam", "two", time="@2000 +0000")
    assert committed(path) == {"first": 1000, "second": 2000}
    write(first="edited", second="b")
    git(tmp_path, "commit", "-qam", "three", time="@3000 +0000")
    assert committed(path) == {"first": 3000, "second": 2000}
    write(first="a", second="b")  # back as it was: it has been something else in between
    git(tmp_path, "commit", "-qam", "four", time="@4000 +0000")
    assert committed(path) == {"first": 4000, "second": 2000}


def test_the_ledger_is_written_for_people_and_for_programs(tmp_path):
    made = claim()
    other = claim(name="other", number="2", settings={"task": "mano", "steps": 10})
    runs = results(made, {"two": seeds(0.8), "one": [0.5] * 8})
    runs |= results(claim(settings={"task": "p-hop", "steps": 77}), {"two": seeds(0.5)})
    entries = judge([made, other], runs, {**OLD, "made-up": 5_000})
    write_ledger(entries, runs, tmp_path, "looplm lab claims")

    page = (tmp_path / "claims.md").read_text()
    assert "**reproduced**" in page and "Exploratory: its entry in claims.yaml" in page
    assert "8 runs in the results belong to no claim" in page and "not run yet" in page
    assert "| two > one | above 0.1 | +0.300 | " in page
    assert "2.40e+10 FLOPs in 24 runs" in page and "16 runs, 1.60e+10 FLOPs" in page
    plain = json.loads((tmp_path / "claims.json").read_text())
    assert [entry["verdict"] for entry in plain["claims"]] == ["reproduced", "not run yet"]
    contrast = plain["claims"][0]["contrasts"][0]
    assert contrast["value"] == pytest.approx(0.3) and len(contrast["left"]) == len(contrast["right"]) == 8
    assert plain["runs"] == 24 and plain["runs_of_no_claim"] == 8

    drawing = ElementTree.fromstring((tmp_path / "claim-made-up.svg").read_text())
    circles = list(drawing.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == 16  # every seed is shown
    assert not (tmp_path / "claim-other.svg").exists()
    assert ledger_table(entries).row_count == 2


def test_the_figure_shows_arms_that_no_contrast_names(tmp_path):
    made = claim(arms={"two": {"loops": 2}, "one": {}, "three": {"loops": 3}})
    runs = results(made, {"two": [0.9] * 8, "one": [0.5] * 8, "three": [0.7] * 8})
    write_ledger(judge([made], runs, {"made-up": 1_000}), runs, tmp_path, "looplm lab claims")
    drawing = ElementTree.fromstring((tmp_path / "claim-made-up.svg").read_text())
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}circle"))) == 3 * 8
    assert "three" in [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")]


def test_the_figure_leaves_out_arms_that_cannot_be_read_as_the_claim_reads(tmp_path):
    made = claim(
        reading={"loop": 2},
        arms={"two": {"loops": 2}, "one": {}, "three": {"loops": 3}},
        contrasts=[{"left": {"arm": "two"}, "right": {"arm": "three"}, "margin": 0.1}],
    )
    assert not made.uncontrasted()  # "one" has no second loop
    runs = results(made, {"two": [0.9] * 8, "three": [0.5] * 8, "one": [0.7] * 8}, loop=2)
    write_ledger(judge([made], runs, {"made-up": 1_000}), runs, tmp_path, "looplm lab claims")
    drawing = ElementTree.fromstring((tmp_path / "claim-made-up.svg").read_text())
    assert len(list(drawing.iter("{http://www.w3.org/2000/svg}circle"))) == 2 * 8
