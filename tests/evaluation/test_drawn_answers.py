"""pass@k by hand, and AIME asked several times on files of the hub's shape (Table 9)."""

import json
import math
from itertools import combinations

import pytest
from eval_models import save_pair
from hypothesis import given
from hypothesis import strategies as st

from looplm.evaluation import tasks
from looplm.evaluation.depths import Depth
from looplm.evaluation.running import Settings, run_tasks
from looplm.evaluation.sampling import pass_at_k
from looplm.evaluation.showing import paper_table
from looplm.evaluation.tasks import load_tasks


@pytest.mark.parametrize(
    ("n", "c", "k", "chance"),
    [
        (1, 0, 1, 0.0),
        (1, 1, 1, 1.0),
        (10, 3, 1, 0.3),
        (10, 3, 10, 1.0),
        (4, 1, 2, 0.5),
        (5, 2, 3, 0.9),
        (20, 1, 10, 0.5),
        (20, 2, 10, 1 - 9 / 38),
        (12, 0, 10, 0.0),
    ],
)
def test_pass_at_k_by_hand(n, c, k, chance):
    assert pass_at_k(n, c, k) == pytest.approx(chance)


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(case):
    n, c, k = case
    draws = [any(sample < c for sample in draw) for draw in combinations(range(n), k)]
    assert pass_at_k(n, c, k) == pytest.approx(sum(draws) / math.comb(n, k))


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0)])
def test_pass_at_k_of_what_cannot_be(n, c, k):
    with pytest.raises(ValueError, match="k must lie in"):
        pass_at_k(n, c, k)


ROWS = {
    "Maxwell-Jia/AIME_2024": [
        {"ID": f"2024-I-{n}", "Problem": f"What is {n} + {n}?", "Solution": "", "Answer": 2 * n} for n in range(1, 4)
    ],
    "math-ai/aime25": [{"problem": f"What is {n} + 1?", "answer": str(n + 1), "id": str(n)} for n in range(1, 4)],
}


@pytest.fixture
def aime(hub):
    """lm-eval's own AIME tasks on files of the columns that the hub's have; made-up problems."""
    for data, rows in ROWS.items():
        hub.put(data, {"default": {"test" if data == "math-ai/aime25" else "train": rows}})
    hub.lm_eval("aime")


@pytest.mark.parametrize(("name", "right"), [("aime24", 2), ("aime25", 2)])
def test_aime_is_asked_several_times_and_checked_by_the_task(aime, name, right):
    (loaded,) = load_tasks([f"paper:{name}:12"])
    task, doc = loaded.task, loaded.task.eval_docs[0]
    assert task.doc_to_text(doc) == f"Question: {doc.get('Problem') or doc['problem']}\nAnswer:"
    sampled = task.config.generation_kwargs
    assert (sampled["do_sample"], sampled["temperature"], sampled["top_p"]) == (True, 1.0, 0.7)
    assert task.config.repeats == 12 and task.get_config("num_fewshot") == 0
    texts = [f"so it is $\\boxed{{{right}}}$", f"${right}$", "no idea", *["\\boxed{77}"] * 9]
    assert task.process_results(doc, [texts]) == {"pass@1": pytest.approx(2 / 12), "pass@10": 1 - 1 / 66}
    assert task.process_results(doc, [["nothing"] * 12]) == {"pass@1": 0.0, "pass@10": 0.0}


def test_one_sample_has_no_pass_at_10_and_others_have_no_samples(aime):
    (loaded,) = load_tasks(["paper:aime24"])
    assert loaded.task.process_results(loaded.task.eval_docs[0], ["2"]) == {"pass@1": 1.0}
    with pytest.raises(
        ValueError, match=r"paper:gsm8k:4: N samples of each problem are for humaneval, .*mbpp_plus, aime24, "
    ):
        load_tasks(["paper:gsm8k:4"])
    with pytest.raises(ValueError, match="'0' is no number of examples or samples above 0"):
        load_tasks(["paper:aime24:0"])


def test_a_whole_run_beside_table_9(aime, tmp_path, monkeypatch):
    monkeypatch.setitem(tasks._THINKING, "max_gen_toks", 6)
    model = str(save_pair(tmp_path / "small" / "model"))
    (result,) = run_tasks(model, Settings(("paper:aime24:10",), (Depth(2),), batch_size=8), tmp_path / "out")
    assert set(result.metrics) == {"pass@1,none", "pass@10,none"} and result.main_metric == "pass@1,none"
    assert len(result.items) == 3 and all(len(item.outputs) == 10 for item in result.items)
    assert len(set(result.items[0].outputs)) > 1  # samples, not one text ten times
    assert json.loads((tmp_path / "out" / f"{result.name}.json").read_text())["recipe"]["generation"]["top_p"] == 0.7
    rows = {(row[1], row[2], row[4]): row[3] for row in paper_table([result]).rows}
    assert rows["Ouro-1.4B-Thinking", "4", "Table 9"] == "65.00"
    assert rows["DeepSeek-Distill-Qwen-7B", "–", "Table 9, pass@10"] == "83.30"
    assert ("small", "2", "here: 0 examples, pass@10") in rows
