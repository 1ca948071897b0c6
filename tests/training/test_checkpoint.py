"""Checkpoints: what was saved comes back bit for bit, half of one is never met, damage is named."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from looplm.training.checkpoint import Checkpoints, open_checkpoint

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8]


def numbers(value: float, size: int = 8) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((size, size), value), "step": torch.tensor(value)}


def written(folder: Path, values=range(1, 4), keep: int = 9) -> Checkpoints:
    """One checkpoint a value, each whole before the next."""
    checkpoints = Checkpoints(folder, keep)
    for value in values:
        checkpoints.save(f"{value:04}", numbers(value), {"step": value})
    checkpoints.wait()
    return checkpoints


def never(text: str) -> None:
    raise AssertionError(f"nothing was to be said, but: {text}")


def content(checkpoint, size: int = 8) -> float:
    """The one number that all of a checkpoint of `numbers` holds."""
    tensors = numbers(-1.0, size)
    checkpoint.load(tensors)
    values = {checkpoint.state["step"], *tensors["weight"].unique().tolist(), tensors["step"].item()}
    assert len(values) == 1
    return values.pop()


tensors_of_all_kinds = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.integers(0, 2**31)), max_size=5
)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=tensors_of_all_kinds, state=st.dictionaries(st.text(), plain_values, max_size=4))
def test_what_was_saved_comes_back_bit_for_bit(tmp_path_factory, kinds, state):
    folder = tmp_path_factory.mktemp("checkpoints")
    saved = {}
    for index, (dtype, shape, seed) in enumerate(kinds):
        draw = torch.Generator().manual_seed(seed)
        raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=draw, dtype=torch.uint8)  # NaN patterns too
        saved[f"a.b-{index}"] = raw.view(dtype).reshape(shape)
    checkpoints = Checkpoints(folder)
    checkpoints.save("one", saved, state)
    checkpoints.wait()
    checkpoint = checkpoints.newest(never)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    checkpoint.load(loaded)
    for name, tensor in saved.items():
        bits, expected = (t.reshape(-1, 1).view(torch.uint8) for t in (loaded[name], tensor))
        assert loaded[name].dtype == tensor.dtype and torch.equal(bits, expected)
    assert checkpoint.state == state
    assert checkpoint.shapes() == {name: tensor.shape for name, tensor in saved.items()}


def test_the_copy_is_made_before_save_returns(tmp_path):
    checkpoints, tensors = Checkpoints(tmp_path), numbers(1.0, 500)
    tensors["weight"].requires_grad_()
    checkpoints.save("0001", tensors, {"step": 1})
    with torch.no_grad():
        tensors["weight"].fill_(7.0), tensors["step"].fill_(7.0)
    checkpoints.wait()
    assert content(checkpoints.newest(never), 500) == 1.0


def test_training_goes_on_while_it_is_written_and_nothing_shows_before_it_is_whole(tmp_path, monkeypatch):
    checkpoints, gate, seen = Checkpoints(tmp_path), threading.Event(), []
    finish = dcp.FileSystemWriter.finish

    def slow(self, metadata, results):
        finish(self, metadata, results)
        assert gate.wait(20)
        seen.append([path.name for path in tmp_path.iterdir() if not path.name.startswith(".")])

    monkeypatch.setattr(dcp.FileSystemWriter, "finish", slow)
    checkpoints.save("0001", numbers(1.0), {"step": 1})  # returns although the writer waits
    checkpoints.check()
    assert checkpoints.names() == [] and checkpoints.newest(never) is None
    gate.set()
    checkpoints.wait()
    assert seen == [[]] and checkpoints.names() == ["0001"]
    assert {path.name for path in (tmp_path / "0001").iterdir()} == {".metadata", "__0_0.distcp", "manifest.json"}


@pytest.mark.parametrize(
    ("keep", "milestones", "left"),
    [(1, "", "5"), (2, "", "45"), (2, "1", "145"), (2, "4", "45"), (1, "24", "245"), (9, "", "12345")],
)
def test_the_last_few_and_the_milestones_stay(tmp_path, keep, milestones, left):
    checkpoints = Checkpoints(tmp_path, keep)
    for name in "12345":
        checkpoints.save(name, numbers(float(name)), {"step": int(name)}, milestone=name in milestones)
    checkpoints.wait()
    assert checkpoints.names() == list(left)
    assert [open_checkpoint(tmp_path / name).milestone for name in left] == [name in milestones for name in left]
    assert sorted(path.name for path in tmp_path.iterdir()) == list(left)


def test_keep_has_a_floor(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_name_stands_for_one_moment(tmp_path):
    checkpoints = written(tmp_path, [1])
    checkpoints.save("0001", numbers(2.0), {"step": 2})
    checkpoints.wait()
    assert content(checkpoints.newest(never)) == 1.0


def test_leftovers_of_an_interrupted_write_are_removed(tmp_path):
    written(tmp_path, [1])
    for name in (".tmp-x", ".old-0000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    assert content(Checkpoints(tmp_path).newest(never)) == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["0001"]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_noticed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("checkpoints")
    written(folder, [1])
    file = data.draw(st.sampled_from(sorted((folder / "0001").iterdir())))
    raw = bytearray(file.read_bytes())
    place, mask = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(1, 255))
    raw[place] ^= mask
    file.write_bytes(raw)
    notes = []
    try:
        # a byte of the manifest may mean nothing, such as an indent: then what it says is unchanged
        assert content(Checkpoints(folder).newest(notes.append)) == 1.0 and file.name == "manifest.json"
    except ValueError:
        assert file.name in notes[0]


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("__0_0.distcp", cut, "__0_0.distcp does not match its checksum"),
        ("__0_0.distcp", Path.unlink, "__0_0.distcp is missing"),
        (".metadata", cut, ".metadata does not match its checksum"),
        ("manifest.json", cut, "manifest.json is not what was written"),
        ("manifest.json", Path.unlink, "manifest.json is not what was written"),
        ("manifest.json", lambda file: file.write_text("[]"), "manifest.json is not what was written"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_it_used(tmp_path, name, harm, said):
    checkpoints, notes = written(tmp_path), []
    harm(tmp_path / "0003" / name)
    assert content(checkpoints.newest(notes.append)) == 2.0
    assert len(notes) == 1 and notes[0].startswith(f"checkpoint 0003 is damaged: {said}")
    assert "damaged-0003" in notes[0] and (tmp_path / "damaged-0003").is_dir()
    assert checkpoints.names() == ["0001", "0002"]
    checkpoints.save("0003", numbers(3.0), {"step": 3})  # training comes to that step again
    checkpoints.wait()
    assert content(checkpoints.newest(never)) == 3.0


def test_where_all_are_damaged_nothing_starts_anew_by_itself(tmp_path):
    notes = []
    written(tmp_path, [1, 2])
    for name in ("0001", "0002"):
        cut(tmp_path / name / "__0_0.distcp")
    for _ in range(2):  # nor at the second start
        with pytest.raises(ValueError, match=r"no whole checkpoint is left in .*; remove that folder to start anew"):
            Checkpoints(tmp_path).newest(notes.append)
    assert len(notes) == 2


def test_a_tensor_that_does_not_fit_is_named(tmp_path):
    checkpoint = written(tmp_path, [1]).newest(never)
    with pytest.raises(ValueError, match="has no tensor 'bias'"):
        checkpoint.load({"bias": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"the shape of 'weight' is \(8, 8\), not \(4, 4\)"):
        checkpoint.load({"weight": torch.zeros(4, 4)})


def test_state_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new")
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoints.save("0001", numbers(1.0), {"loss": float("nan")})
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_full_is_said_and_the_last_good_one_stays(tmp_path):
    checkpoints = written(tmp_path, [1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the system refuses the write, as at a full disk
    try:
        checkpoints.save("0002", numbers(2.0, 1000), {"step": 2})
        with pytest.raises(OSError, match=r"checkpoint 0002 could not be written to .*: File too large; the last") as e:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the last good one is 0001; make room and start the same command again" in str(e.value)
    assert [path.name for path in tmp_path.iterdir()] == ["0001"]
    assert content(checkpoints.newest(never)) == 1.0
    checkpoints.save("0002", numbers(2.0, 1000), {"step": 2})
    checkpoints.wait()
    assert content(checkpoints.newest(never), 1000) == 2.0


def test_a_failure_in_the_background_is_heard_without_waiting(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(dcp.FileSystemWriter, "finish", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    checkpoints.save("0001", numbers(1.0), {"step": 1})

    def train_on():
        for _ in range(2000):
            checkpoints.check()
            time.sleep(0.01)

    with pytest.raises(OSError, match="No space left; there is none before it") as error:
        train_on()
    assert error.value.errno == 28 and list(tmp_path.iterdir()) == []


WRITER = """
import sys, torch
from pathlib import Path
from looplm.training.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), keep=2)
last = checkpoints.newest(lambda text: sys.exit("damaged: " + text))
step = last.state["step"] if last else 0
print("ready", flush=True)
while True:
    step += 1
    tensors = {f"{i}": torch.full((200, 200), float(step)) for i in range(20)}
    checkpoints.save(f"{step:08}", tensors, {"step": step})
"""


def test_a_process_killed_while_it_writes_leaves_whole_checkpoints_only(tmp_path):
    draw, last = random.Random(7), 0
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.3 + draw.random() / 2)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL and child.stdout.read() == ""
        found = [open_checkpoint(tmp_path / name) for name in Checkpoints(tmp_path).names()]
        assert 1 <= len(found) <= 3  # two, and the one that was to be removed next
        for checkpoint in found:
            tensors = {f"{i}": torch.zeros(200, 200) for i in range(20)}
            checkpoint.load(tensors)
            assert {value for t in tensors.values() for value in t.unique().tolist()} == {checkpoint.state["step"]}
        assert found[-1].state["step"] > last
        last = found[-1].state["step"]


def test_the_manifest_is_for_people_too(tmp_path):
    written(tmp_path, [1])
    manifest = json.loads((tmp_path / "0001" / "manifest.json").read_text())
    assert manifest["state"] == {"step": 1} and set(manifest["files"]) == {".metadata", "__0_0.distcp"}
