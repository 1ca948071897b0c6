import io
import json
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from looplm.training.tracking import MetricsLog, Progress, Tracker, check_tracking, read_metrics, short


class Clock:
    """A hand-moved `time.monotonic`."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_log_is_opened_lazily_flushed_and_appended_to(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    assert not path.parent.exists()
    log.write({"step": 1, "loop_losses": [4.0, 3.5]})
    assert records(path) == [{"step": 1, "loop_losses": [4.0, 3.5]}]
    log.close()
    with MetricsLog(path) as again:
        again.write({"step": 2, "loss": float("nan"), "name": "é\n"})
    assert records(path)[1:] == [{"step": 2, "loss": None, "name": "é\n"}]


def test_a_record_that_is_not_plain_writes_nothing(tmp_path):
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.write({"step": 1})
        with pytest.raises(TypeError):
            log.write({"step": 2, "loss": object()})
    assert records(log.path) == [{"step": 1}]


@given(st.lists(st.dictionaries(st.text("abc", min_size=1), st.floats(allow_nan=False)), max_size=3), st.data())
def test_a_line_cut_at_any_byte_costs_only_itself(rows, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.jsonl"
        with MetricsLog(path) as log:
            for row in rows:
                log.write(row)
        whole = path.read_bytes() if rows else b""
        kept = whole[: data.draw(st.integers(0, len(whole)))]
        path.write_bytes(kept)
        with MetricsLog(path) as log:
            log.write({"step": 9})
        survivors = kept.count(b"\n")
        assert path.read_bytes() == b"".join(whole.splitlines(True)[:survivors]) + b'{"step": 9}\n'


def test_plain_lines_come_at_most_every_so_often(monkeypatch):
    clock, out = Clock(monkeypatch), io.StringIO()
    with Progress(1.0, "training", Console(file=out), every=10.0) as progress:
        for i in range(1, 6):
            progress.update(i / 10, tokens=1_000_000 + 30_000 * i, loss=5 - i, depth=2.346, exit_beta=0.05)
            clock.now += 6
        progress.note("[checkpoint] saved")
    # Printed at 0 s, 12 s and 24 s; 30 000 tokens and a tenth of the work take 6 s, so 7 tenths take 42 s.
    assert out.getvalue().splitlines() == [
        "training  10% loss 4.000 · depth 2.35 · exit beta 0.05",
        "training  30% 5k tok/s · 0:42 left · loss 2.000 · depth 2.35 · exit beta 0.05",
        "training  50% 5k tok/s · 0:30 left · loss 0.000 · depth 2.35 · exit beta 0.05",
        "[checkpoint] saved",
    ]


def test_the_last_state_is_printed_once_even_after_an_error(monkeypatch):
    clock, out = Clock(monkeypatch), io.StringIO()

    def work():
        with Progress(2, "tuning", Console(file=out)) as progress:
            progress.update(0.5, 10, 3.0, 1.0)
            clock.now += 1
            progress.update(1, 20, 2.0, 1.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert out.getvalue().splitlines() == [
        "tuning  25% loss 3.000 · depth 1.00",
        "tuning  50% 10 tok/s · 0:02 left · loss 2.000 · depth 1.00",
    ]


def test_the_rate_forgets_what_is_older_than_half_a_minute(monkeypatch):
    clock, out = Clock(monkeypatch), io.StringIO()
    with Progress(10_000, "training", Console(file=out), every=0) as progress:
        for tokens in (0, 100, 200):
            progress.update(tokens, tokens, 1.0, 1.0)
            clock.now += 60
        progress.update(6200, 6200, 1.0, 1.0)
    assert "100 tok/s · 0:38 left" in out.getvalue().splitlines()[-1]


def test_without_a_terminal_there_are_no_control_characters(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    for console in (Console(file=io.StringIO()), Console(file=io.StringIO(), force_terminal=True)):
        with Progress(1.0, "training", console) as progress:
            progress.update(1.0, 100, 3.0, 2.0)
        text = console.file.getvalue()
        assert text == "training 100% loss 3.000 · depth 2.00\n"


def test_a_terminal_gets_a_bar_with_everything_on_one_line(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    clock, out = Clock(monkeypatch), io.StringIO()
    with Progress(1.0, "training", Console(file=out, force_terminal=True, width=80)) as progress:
        progress.update(0.25, 1000, 3.2, 2.3)
        clock.now += 3600
        progress.update(0.5, 37_000, 3.1, 2.4)
        progress.note("saved [step 2]")
    text = out.getvalue()
    assert "saved [step 2]" in text
    assert "━" in text
    last = text[text.rindex("training") :]
    for part in ("50%", "10 tok/s", "2:00:00 left", "loss 3.100", "depth 2.40"):
        assert part in last


def test_a_total_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"total 0 of the progress of 'training' must be above 0"):
        Progress(0, "training")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (950, "950"), (999.6, "1k"), (12_345, "12.3k"), (4_500_000, "4.5M"), (1.2e9, "1.2B"), (7.7e12, "7.7T")],
)
def test_short(value, shown):
    assert short(value) == shown


@given(st.floats(1, 9e14))
def test_short_is_within_half_a_percent(value):
    text = short(value)
    scale = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1.0)
    assert float(text.rstrip("kMBT")) * scale == pytest.approx(value, rel=5.01e-3)
    assert len(text) <= 5


def test_a_tracker_writes_every_kind_of_record_and_reads_it_back(tmp_path):
    step = {"stage": "a", "step": 0, "tokens": 5, "loss": 1.5, "loop_losses": [2.0, 1.0]}
    with Tracker(tmp_path) as tracker:
        tracker.step(step)
        tracker.evaluation({"tokens": 5, "loop_losses": [2.0]})
        tracker.warning({"text": "no"})
        tracker.gate({"step": 0})
        tracker.stage({"name": "a", "stage": 1})
    assert read_metrics(tmp_path / "metrics.jsonl") == {
        "step": [step],
        "evaluation": [{"tokens": 5, "loop_losses": [2.0]}],
        "warning": [{"text": "no"}],
        "gate": [{"step": 0}],
        "stage_result": [{"name": "a", "stage": 1}],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_gets_the_numbers_over_tokens(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Tracker(tmp_path, ["tensorboard"]) as tracker:
        for step in range(3):
            losses = [2.0 - step, 1.0 - step]
            tracker.step({"stage": "a", "step": step, "tokens": 8 * step, "loss": 1.5, "loop_losses": losses})
        tracker.evaluation({"stage": "a", "tokens": 16, "loop_losses": [4.0], "source_losses": {"x": [4.0]}})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "train/loop_losses/1",
        "train/loop_losses/2",
        "validation/loop_losses/1",
    }
    assert [(e.step, e.value) for e in events.Scalars("train/loop_losses/2")] == [(0, 1.0), (8, 0.0), (16, -1.0)]


def test_tensorboard_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_tracking([])
    with pytest.raises(ValueError, match=r"not installed: pip install 'looplm\[track\]'"):
        check_tracking(["tensorboard"])
