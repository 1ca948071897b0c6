"""`looplm lab list` as a person meets it."""

import pytest

from looplm.lab.tasks import TASKS, make_task


@pytest.fixture
def lab(looplm_command, monkeypatch):
    """Runs `looplm lab ARGUMENTS`; gives (exit code, words on standard output, standard error)."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments):
        code, out, err = looplm_command("lab", *arguments)
        return code, " ".join(out.split()), err

    return run


def test_every_task_is_described_with_a_real_example(lab):
    code, out, err = lab("list")
    assert (code, err) == (0, "")
    places = [out.index(f"{name} {' '.join(task.shows.split())[:40]}") for name, task in TASKS.items()]
    assert places == sorted(places)
    assert all(" ".join(make_task(name).example().split()) in out for name in TASKS)


def test_one_task_with_its_settings(lab):
    code, out, _ = lab("list", "mano", "--scale", "paper")
    assert code == 0 and "Rows of 24 tokens, a vocabulary of 40" in out and "modulus 23 p; numbers are 0..p - 1." in out
    assert "Difficulty (operators): 1, 2, 3, 4, 5, 6, 7, 8, 9, 10; tested at 10" in out and "capo" not in out


def test_an_unknown_task(lab):
    assert lab("list", "manno") == (2, "", "looplm: no such task: manno; did you mean 'mano'?\n")


@pytest.mark.parametrize("arguments", [[], ["lst"], ["list", "mano", "--scale", "huge"]])
def test_wrong_arguments(lab, arguments):
    code, out, err = lab(*arguments)
    assert (code, out) == (2, "") and "Traceback" not in err
