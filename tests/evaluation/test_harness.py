"""Our lm-eval class against lm-eval's own at full depth, exactly; and every depth against a model cut to it."""

import copy

import pytest
from eval_models import choice_records, question_records, save_pair, small_pair, write_lines
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from looplm.evaluation.depths import Depth
from looplm.evaluation.harness import AnswerStore, LoopedLM, check_generation
from looplm.evaluation.items import load_items
from looplm.evaluation.tasks import items_task
from looplm.exits import QExit
from looplm.model.loading import load_model


def run(lm, task, **options):
    task.set_config(key="num_fewshot", value=options.pop("num_fewshot", 0))
    task.set_fewshot_seed(seed=0)
    tasks = {"tasks": {"t": task}, "groups": {}, "group_map": {}}
    return evaluate(lm, tasks, bootstrap_iters=0, **options)


def responses(found):
    return [[response for texts in sample["resps"] for response in texts] for sample in found["samples"]["t"]]


def same_choices(one, other):
    """Equal log-likelihoods, and what is greedy alike: a product's last fp32 bit is not every processor's."""
    sums, greedy = zip(*(answer for answers in one for answer in answers), strict=True)
    wanted, wanted_greedy = zip(*(answer for answers in other for answer in answers), strict=True)
    return greedy == wanted_greedy and sums == pytest.approx(wanted, rel=1e-6)


@pytest.fixture
def task(tmp_path):
    return items_task(load_items(write_lines(tmp_path / "t.jsonl", choice_records())), "t")


@pytest.mark.parametrize("layout", [{}, {"num_prelude_layers": 1, "num_coda_layers": 1, "tie_word_embeddings": True}])
@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("shots", [0, 2])
def test_full_depth_log_likelihoods_are_those_of_lm_eval(tmp_path, task, layout, batch_size, shots):
    folder = save_pair(tmp_path / "model", **layout)
    model, tokenizer = load_model(str(folder))
    ours = LoopedLM(model, tokenizer, [Depth(1), Depth(2), Depth(3)], batch_size=batch_size)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")
    mine, other = run(ours, task, num_fewshot=shots), run(theirs, task, num_fewshot=shots)
    assert same_choices(responses(mine), responses(other))
    assert mine["results"] == other["results"]


def test_rolling_log_likelihoods_are_those_of_lm_eval(tmp_path):
    model, tokenizer = small_pair(max_position_embeddings=24)
    text = "the union shall make law and peace, " * 6
    from lm_eval.api.instance import Instance

    def requests():
        return [Instance("loglikelihood_rolling", {}, (text[:length],), 0) for length in (40, 200)]

    ours = LoopedLM(model, tokenizer, [Depth(1), Depth(3)], batch_size=2)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, backend="causal")
    assert ours.loglikelihood_rolling(requests()) == theirs.loglikelihood_rolling(requests())
    ours.depth = ours.depths[0]
    shallow = ours.loglikelihood_rolling(requests())
    config = model.config
    config.total_ut_steps = 1
    assert shallow == theirs.loglikelihood_rolling(requests())
    config.total_ut_steps = 3


@pytest.mark.parametrize("chat", [False, True])
def test_full_depth_generation_is_that_of_lm_eval(tmp_path, chat):
    model, tokenizer = small_pair()
    task = items_task(load_items(write_lines(tmp_path / "t.jsonl", question_records())), "t")
    options = {"apply_chat_template": chat, "num_fewshot": 1}
    ours = run(LoopedLM(model, tokenizer, [Depth(3)], batch_size=4), task, **options)
    theirs = run(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, backend="causal"), task, **options)
    assert responses(ours) == responses(theirs) and any(text for texts in responses(ours) for text in texts)


def test_each_depth_is_a_model_of_so_many_loops(task):
    model, tokenizer = small_pair()
    depths = [Depth(1), Depth(2), Depth(4)]
    lm = LoopedLM(model, tokenizer, depths, batch_size=3)
    found = {}
    for depth in depths:
        lm.depth = depth
        found[depth.loops] = responses(run(lm, task))
    for loops in (1, 2, 4):
        cut, _ = small_pair(total_ut_steps=loops)
        cut.load_state_dict(model.state_dict())
        alone = HFLM(pretrained=cut, tokenizer=tokenizer, batch_size=3, backend="causal")
        assert same_choices(responses(run(alone, task)), found[loops])
    assert found[1] != found[2] != found[4]


def test_all_depths_come_from_one_pass_of_the_deepest(task, monkeypatch):
    model, tokenizer = small_pair()
    lm = LoopedLM(model, tokenizer, [Depth(loop) for loop in range(1, 5)], batch_size=3)
    ran = []
    loop = type(model.model).loop
    monkeypatch.setattr(type(model.model), "loop", lambda self, *a: ran.append(a[-1]) or loop(self, *a))
    for depth in lm.depths:
        lm.depth = depth
        run(lm, task)
    assert len(ran) % 4 == 0 and ran == [1, 2, 3, 4] * (len(ran) // 4) and len(ran) <= 4 * 30


@pytest.mark.parametrize("policy", ["per_loop", "last"])
def test_generation_stops_for_real_and_is_counted(tmp_path, policy):
    model, tokenizer = small_pair()
    task = items_task(load_items(write_lines(tmp_path / "t.jsonl", question_records())), "t")
    depth = Depth(3, QExit(0.6), "freeze", "full", "q=0.6")
    lm = LoopedLM(model, tokenizer, [depth], kv_policy=policy, batch_size=4)
    texts = responses(run(lm, task))
    usage = lm.session.usage.as_dict()
    assert 1 < usage["loops_read"] < 3 and usage["positions_read"] >= len(texts)
    prompt = tokenizer("What shall the union make in 1700? Answer:", return_tensors="pt")["input_ids"]
    plain = model.generate(prompt, exit_rule=QExit(0.6), kv_policy=policy, max_new_tokens=64, do_sample=False)
    continued = tokenizer.decode(plain[0, prompt.shape[1] :], skip_special_tokens=True)
    assert texts[0][0] == continued.split("\n")[0]


def test_samples_are_the_same_at_every_run_and_differ_by_seed(tmp_path):
    model, tokenizer = small_pair()
    task = items_task(load_items(write_lines(tmp_path / "t.jsonl", question_records(3))), "t")
    task.config.generation_kwargs = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}

    def texts(seed):
        return responses(run(LoopedLM(model, tokenizer, [Depth(3)], batch_size=2, seed=seed), task))

    assert texts(1) == texts(1) != texts(2)


def test_other_policies_score_as_they_generate(task):
    model, tokenizer = small_pair()
    same = LoopedLM(model, tokenizer, [Depth(3)], batch_size=4)
    last = LoopedLM(model, tokenizer, [Depth(3)], kv_policy="last", batch_size=4)
    one, other = responses(run(same, task)), responses(run(last, task))
    short = [a[0] - b[0] for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    assert any(abs(gap) > 1e-3 for gap in short)


def test_answers_are_kept_and_a_torn_line_is_dropped(task, tmp_path, monkeypatch):
    model, tokenizer = small_pair()
    path = tmp_path / "answers.jsonl"
    whole = responses(run(LoopedLM(model, tokenizer, [Depth(2), Depth(3)], batch_size=3), task))

    class Killed(Exception):
        pass

    store = AnswerStore(path)
    put, kept = store.put, []

    def dying(*arguments):
        put(*arguments)
        kept.append(arguments)
        if len(kept) == 40:
            raise Killed

    monkeypatch.setattr(store, "put", dying)
    with pytest.raises(Killed):
        run(LoopedLM(model, tokenizer, [Depth(2), Depth(3)], batch_size=3, store=store), task)
    store.close()
    path.write_bytes(path.read_bytes()[:-9])
    again = AnswerStore(path)
    calls = []
    loop = type(model.model).loop
    monkeypatch.setattr(type(model.model), "loop", lambda self, *a: calls.append(1) or loop(self, *a))
    lm = LoopedLM(model, tokenizer, [Depth(2), Depth(3)], batch_size=3, store=again)
    assert responses(run(lm, task)) == whole
    first = len(calls)
    assert responses(run(lm, task)) == whole and len(calls) == first
    again.close()
    assert responses(run(LoopedLM(model, tokenizer, [Depth(3)], batch_size=3, store=AnswerStore(path)), task)) == whole
    assert len(calls) == first


def test_texts_longer_than_the_context_are_cut_from_the_left_as_lm_eval_does(task):
    model, tokenizer = small_pair(max_position_embeddings=16)
    ours = LoopedLM(model, tokenizer, [Depth(3)], batch_size=2)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, backend="causal")
    options = {"num_fewshot": 3}
    mine, other = ([s for item in responses(run(lm, task, **options)) for s, _ in item] for lm in (ours, theirs))
    assert mine == pytest.approx(other, abs=1e-4)  # cut inputs are put into other batches than lm-eval's


def test_answers_that_leave_no_room_for_the_question_are_refused(tmp_path):
    model, tokenizer = small_pair(max_position_embeddings=64)
    task = items_task(load_items(write_lines(tmp_path / "t.jsonl", question_records(2))), "t")
    with pytest.raises(ValueError, match="writes up to 64 tokens, but the context of the model holds 64"):
        run(LoopedLM(model, tokenizer, [Depth(1)]), task)


def test_a_tokenizer_without_beginning_and_end(task):
    """As those of the lab: choices are scored as they are; an empty context and texts need such a token."""
    from lm_eval.api.instance import Instance

    model, tokenizer = small_pair(bos_token_id=None, eos_token_id=None)
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = bare.eos_token = None
    lm = LoopedLM(model, bare, [Depth(3)], batch_size=4)
    assert responses(run(lm, task)) == responses(run(LoopedLM(model, tokenizer, [Depth(3)], batch_size=4), task))
    with pytest.raises(ValueError, match="no context, and the tokenizer neither a beginning nor an end token"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("", "law"), 0)])
    with pytest.raises(ValueError, match="the tokenizer has no end token"):
        lm.generate_until([Instance("generate_until", {}, ("law", {"until": ["."], "max_gen_toks": 4}), 0)])


def test_what_a_model_class_refuses():
    model, tokenizer = small_pair()
    with pytest.raises(ValueError, match="no depth is given"):
        LoopedLM(model, tokenizer, [])
    with pytest.raises(ValueError, match="selects, but this task generates text"):
        check_generation([Depth.of_rule("q=0.5", 3)])
