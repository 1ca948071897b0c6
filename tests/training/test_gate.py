"""Stage II: frozen states against plain passes, a fit against its known answer, and nothing but the gate moves."""

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_run import encoded, read_lines, small_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from looplm.data.pipeline import Windows, validation_batches
from looplm.model.modeling import OuroForCausalLM
from looplm.objectives.adaptive_gate import adaptive_gate_loss, continuation_targets
from looplm.training.gate import FrozenStates, GateSettings, collect_states, fit_gate
from looplm.training.tracking import MetricsLog

CORPUS = encoded([30, 5, 2, 41, 17, 60, 44])
WINDOWS = Windows(CORPUS, 16, separate_documents=True, keep_remainder=True)
TOKENS = CORPUS.text_tokens


def batches(size: int = 4) -> Iterator[dict[str, Tensor]]:
    return validation_batches(WINDOWS, size)


@pytest.fixture
def model() -> OuroForCausalLM:
    """Weights large enough that loops, tokens and hazards differ visibly."""
    torch.manual_seed(0)
    model = small_model(tie_word_embeddings=False).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(10)
    return model


def settings(**values: Any) -> GateSettings:
    return GateSettings(**{"tokens": 500, "epochs": 3, "batch_size": 64, **values})


def digests(model: OuroForCausalLM) -> dict[str, str]:
    return {name: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest() for name, t in model.state_dict().items()}


# --- frozen states ---


def test_states_and_losses_are_those_of_one_plain_pass_a_loop(model: OuroForCausalLM) -> None:
    frozen = collect_states(model, batches(), 500)
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    model.eval()
    states: list[list[Tensor]] = [[], [], []]
    losses: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for batch in batches(1):
            valid = batch["labels"] != -100
            for loop in range(3):
                out = model(
                    batch["input_ids"],
                    position_ids=batch["position_ids"],
                    num_loop_steps=loop + 1,
                    output_hidden_states=True,
                )
                states[loop].append(out.hidden_states[-1][valid])
                losses[loop].append(cross_entropy(out.logits[valid], batch["labels"][valid], reduction="none"))
    assert frozen.states.shape == (TOKENS, 3, 32) and frozen.losses.shape == (TOKENS, 3)
    torch.testing.assert_close(frozen.states, torch.stack([torch.cat(s) for s in states], 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(frozen.losses, torch.stack([torch.cat(x) for x in losses], 1), rtol=1e-4, atol=1e-4)


def test_the_first_tokens_are_kept_in_the_models_dtype(model: OuroForCausalLM) -> None:
    whole, part = collect_states(model, batches(), 10_000), collect_states(model, batches(), 50)
    assert len(whole.losses) == TOKENS
    torch.testing.assert_close(part.states, whole.states[:50])
    torch.testing.assert_close(part.losses, whole.losses[:50])
    assert collect_states(model.bfloat16(), batches(), 50).states.dtype == torch.bfloat16


def test_batches_are_read_no_further_than_needed(model: OuroForCausalLM) -> None:
    read = []
    collect_states(model, (read.append(1) or batch for batch in batches()), 50)
    assert len(read) == 1


def test_nothing_to_learn_from(model: OuroForCausalLM) -> None:
    nothing = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches()]
    for data in (nothing, []):
        with pytest.raises(ValueError, match="the batches hold no target token"):
            collect_states(model, data, 100)
    assert model.training
    with pytest.raises(ValueError, match="exit_gate_pooling is 'causal_mean'"):
        collect_states(small_model(exit_gate_pooling="causal_mean"), batches(), 100)


# --- the fit ---


@pytest.mark.parametrize("target", ["published", "lookahead"])
def test_only_the_gate_changes(model: OuroForCausalLM, target: str) -> None:
    before = digests(model)
    fit = fit_gate(model, collect_states(model, batches(), 500), settings(target=target), seed=0)
    changed = {name for name, digest in digests(model).items() if before[name] != digest}
    assert changed == {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}
    assert fit.loss_after < fit.loss_before and fit.target == target and fit.tokens == TOKENS
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("target", ["published", "lookahead"])
def test_means_and_records_are_those_of_the_model(model: OuroForCausalLM, target: str) -> None:
    frozen = collect_states(model, batches(), 500)

    def gates() -> Tensor:
        model.eval()
        with torch.no_grad():
            found = [
                model(batch["input_ids"], position_ids=batch["position_ids"]).gate_logits[batch["labels"] != -100]
                for batch in batches()
            ]
        return torch.cat(found)

    before = gates()
    fit = fit_gate(model, frozen, settings(target=target, epochs=5, batch_size=10_000), seed=0)
    for logits, loss, hazards in (
        (before, fit.loss_before, fit.hazards_before),
        (gates(), fit.loss_after, fit.hazards_after),
    ):
        assert hazards == pytest.approx(logits.sigmoid().mean(0).tolist(), rel=1e-4)
        assert loss == pytest.approx(adaptive_gate_loss(logits, frozen.losses, target=target).item(), rel=1e-4)
    assert fit.continuation == pytest.approx(continuation_targets(frozen.losses).mean(0).tolist(), rel=1e-5)
    first = fit.history[0]
    assert first["loss"] == pytest.approx(fit.loss_before, rel=1e-5)
    assert first["hazards"] == pytest.approx(fit.hazards_before, rel=1e-5)
    assert [record["step"] for record in fit.history] == [0, 1, 2, 3, 4]


def test_the_fit_finds_the_known_optimum() -> None:
    """States that tell the gains apart: the best gate has hazard 1 - w in both groups, which is solved for by hand."""
    # Tokens gain 0.045 or 0 in the second loop: w = sigmoid(50 * 0.04) = sigmoid(2), and sigmoid(-0.25). The state of
    # loop 1 is (1, 0) or (0, 1) accordingly, so the logits -2 and 0.25 are the optimum; T = 2, gate 1 judged.
    states = torch.eye(2)[torch.arange(400) % 2][:, None].repeat(1, 2, 1)
    losses = torch.tensor([[1.045, 1.0], [1.0, 1.0]])[torch.arange(400) % 2]
    model = small_model(hidden_size=2, num_attention_heads=1, total_ut_steps=2)
    fit = fit_gate(model, FrozenStates(states, losses), settings(epochs=150, learning_rate=0.1), seed=1)
    gate = model.model.early_exit_gate
    found = (torch.eye(2) @ gate.weight[0] + gate.bias).detach()
    torch.testing.assert_close(found, torch.tensor([-2.0, 0.25]), rtol=0, atol=0.02)
    w = torch.tensor([2.0, -0.25]).sigmoid()
    entropy = -(w * w.log() + (1 - w) * (1 - w).log()).mean().item() / 2
    assert fit.loss_after == pytest.approx(entropy, abs=1e-4)


def test_the_published_target_moves_the_first_gate_through_the_shared_one(model: OuroForCausalLM) -> None:
    """Equation 6 has no term for gate 1, and yet lambda_1 drifts; the records show it."""
    frozen = collect_states(model, batches(), 500)
    fit = fit_gate(model, frozen, settings(target="published", epochs=20), seed=0)
    first = [record["hazards"][0] for record in fit.history]
    assert abs(fit.hazards_after[0] - fit.hazards_before[0]) > 0.02
    assert abs(first[-1] - first[0]) > 0.02


def test_a_fit_is_a_function_of_its_seed(model: OuroForCausalLM) -> None:
    frozen, own = collect_states(model, batches(), 500), model.model.early_exit_gate.state_dict()
    own = {name: value.clone() for name, value in own.items()}
    results = []
    for seed in (3, 3, 4):
        model.model.early_exit_gate.load_state_dict(own)
        torch.rand(5)  # the global generator has no say
        fit = fit_gate(model, frozen, settings(), seed=seed)
        results.append((model.model.early_exit_gate.weight.detach().clone(), fit))
    assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert not torch.equal(results[0][0], results[2][0])


def test_every_token_is_seen_once_an_epoch(model: OuroForCausalLM) -> None:
    sizes, seen = [], torch.zeros(130)

    class Watched(Tensor):
        def __getitem__(self, index: Any) -> Tensor:
            if isinstance(index, Tensor):
                sizes.append(len(index))
                seen.index_add_(0, index.as_subclass(Tensor), torch.ones(len(index)))
            return super().__getitem__(index).as_subclass(Tensor)

    frozen = FrozenStates(torch.zeros(130, 3, 32).as_subclass(Watched), torch.zeros(130, 3))
    fit = fit_gate(model, frozen, settings(epochs=2), seed=0)
    assert sizes == [64, 64, 2] * 2 and (seen == 2).all() and len(fit.history) == 6


def test_records_can_go_to_a_file(model: OuroForCausalLM, tmp_path: Any) -> None:
    with MetricsLog(tmp_path / "gate.jsonl") as log:
        fit = fit_gate(model, collect_states(model, batches(), 200), settings(epochs=1), seed=0, log=log.write)
    rows = read_lines(tmp_path / "gate.jsonl")
    assert [row["hazards"] for row in rows] == [record["hazards"] for record in fit.history]
    assert rows[0].keys() == {"step", "loss", "hazards", "expected_depth"}


def test_a_loss_that_is_not_finite_leaves_the_gate_as_it_was(model: OuroForCausalLM) -> None:
    frozen, before = collect_states(model, batches(), 100), digests(model)
    frozen.states[7] = torch.nan
    with pytest.raises(FloatingPointError, match="step 0: the gate's loss is nan"):
        fit_gate(model, frozen, settings(batch_size=1000), seed=0)
    assert digests(model) == before


def test_one_loop_has_no_gate_to_fit() -> None:
    model = small_model(total_ut_steps=1)
    with pytest.raises(ValueError, match="the number of loops is 1"):
        fit_gate(model, collect_states(model, batches(), 100), settings(), seed=0)


def test_a_bf16_model_is_fitted_in_fp32(model: OuroForCausalLM) -> None:
    """Steps below the resolution of bf16 add up; the gate is rounded once, at the end."""
    fit = fit_gate(
        model.bfloat16(), collect_states(model, batches(), 500), settings(epochs=30, learning_rate=1e-3), seed=0
    )
    assert model.model.early_exit_gate.weight.dtype == torch.bfloat16
    losses = [record["loss"] for record in fit.history]
    assert fit.loss_after < fit.loss_before and losses[-1] < losses[0]


@pytest.mark.parametrize("values", [{"target": "next"}, {"k": 0}, {"gamma": -1}, {"tokens": 0}, {"learning_rate": 0}])
def test_settings_are_checked(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"recipe: {next(iter(values))} is"):
        GateSettings.validated(values, "recipe")
