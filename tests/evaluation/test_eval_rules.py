"""What rules compare, against the rules themselves; settings that reach a depth; what is refused."""

import pytest
import torch
from tiny import tiny_config, tiny_model, tokens

from looplm.evaluation.depths import Depth
from looplm.evaluation.rules import NAMES, check_rules, plain_pass, reads_every_loop, rules_for
from looplm.evaluation.scoring import Request, score

LOOPS = 5


def requests(number: int = 3, length: int = 24, read: int = 20) -> list[Request]:
    rows = tokens(number, length + 1, seed=3).tolist()
    return [(row[: length + 1 - read], row[length + 1 - read :]) for row in rows]


@pytest.fixture(scope="module")
def model():
    return tiny_model(total_ut_steps=LOOPS)


@pytest.mark.parametrize("name", NAMES)
def test_levels_tell_where_the_rule_stops(model, name) -> None:
    """Selecting by the rule itself at each of its settings gives the mean depth that the levels say."""
    asked = requests()
    plain = plain_pass(model, asked, [name])
    settings = plain.settings(name, [1.5, 2.0, 3.0, 4.0, 4.7])
    assert len(settings) >= 3
    depths = [Depth.of_rule(f"{name}={setting!r}", LOOPS) for setting in settings]
    found = score(model, asked, depths, batch_size=2).mean_read_depth.tolist()
    falling = name in ("difference", "entropy", "kl")
    for setting, depth in zip(settings, found, strict=True):
        goes_on = plain.levels[name] < (-setting if falling else setting)
        assert depth == pytest.approx(float(1 + goes_on.double().sum(1).mean()), abs=0.02)  # one of 60 on the edge
    assert found == sorted(found) and found[-1] - found[0] > 1


def test_settings_reach_their_depths(model) -> None:
    plain = plain_pass(model, requests(), ["q"])
    (setting,) = plain.settings("q", [3.0])
    mean = float(1 + (plain.levels["q"] < setting).double().sum(1).mean())
    assert mean == pytest.approx(3.0, abs=1 / len(plain.levels["q"]) + 1e-9)


@pytest.mark.parametrize("name", ["difference", "kl"])
def test_rules_that_compare_loops_cannot_fire_at_the_first(model, name) -> None:
    levels = plain_pass(model, requests(), [name]).levels[name]
    assert bool((levels[:, 0] == -torch.inf).all()) and bool(levels[:, 1:].isfinite().all())
    two = plain_pass(tiny_model(total_ut_steps=2), requests(), [name])
    assert two.levels[name].shape == (60, 1) and two.settings(name, [1.5]) == []


def test_predictions_are_those_of_every_loop(model) -> None:
    asked = requests(2)
    found = plain_pass(model, asked, []).predictions
    for row, (context, target) in enumerate(asked):
        for loop in range(LOOPS):
            logits = model(torch.tensor([(context + target)[:-1]]), exit_at_step=loop).logits[0, -len(target) :]
            assert found[row * 20 : (row + 1) * 20, loop].tolist() == logits.argmax(-1).tolist()


def test_what_a_model_can_run() -> None:
    assert rules_for(tiny_config()) == list(NAMES)
    assert rules_for(tiny_config(num_coda_layers=1)) == ["q", "difference"]
    assert rules_for(tiny_config(exit_gate_pooling="causal_mean")) == list(NAMES[1:])
    assert [reads_every_loop(name) for name in NAMES] == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("names", "fields", "message"),
    [
        (["dance"], {}, "rule 'dance' is not known; there are q, difference, max_probability, entropy, kl"),
        (["q", "q"], {}, "name at least one, and each once"),
        ([], {}, "rules are empty"),
        (["q"], {"total_ut_steps": 1}, "the model has 1 loop: there is nothing to leave early"),
        (["q"], {"exit_gate_pooling": "causal_mean"}, "no gate for each token .*; leave q out"),
        (["q", "kl"], {"num_coda_layers": 2}, "kl read the coda's output, .* has 2 coda layers: leave them out"),
    ],
)
def test_rules_that_cannot_run_are_refused(names, fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_rules(names, tiny_config(**fields))
