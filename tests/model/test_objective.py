"""`forward(labels=...)` is the paper's objective (equation 4), against a reference that loops over tokens and loops."""

import math
from typing import Any

import pytest
import torch
from tiny import VARIANTS, tiny_model, tokens
from torch import Tensor

from looplm.model.cache import LoopCache
from looplm.model.modeling import OuroForCausalLM

IDS = tokens(2, 9)
LABELS = IDS.clone()
LABELS[0, 3] = LABELS[1, 6:] = -100


def close(actual: Tensor, expected: Tensor | float) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-9, atol=1e-9)


def plain_objective(
    model: OuroForCausalLM, ids: Tensor, targets: Tensor, beta: float, hazard: float | None = None, **inputs: Any
) -> tuple[Tensor, list[Tensor]]:
    """Equation 4 as a sum over tokens, differentiable; the mean loss of each loop. `hazard`: of a geometric prior."""
    num_loops = model.config.total_ut_steps
    per_loop = [model(ids, exit_at_step=t, **inputs) for t in range(num_loops)]
    gates = per_loop[0].gate_logits
    total, count = torch.zeros((), dtype=gates.dtype), 0
    means = [torch.zeros((), dtype=gates.dtype) for _ in range(num_loops)]
    for b in range(ids.shape[0]):
        for i in range(ids.shape[1]):
            if targets[b, i] == -100:
                continue
            count += 1
            survival = torch.ones((), dtype=gates.dtype)
            for t in range(num_loops):
                last = t == num_loops - 1
                p = survival if last else survival * torch.sigmoid(gates[b, i, t])
                survival = survival - p
                loss = -per_loop[t].logits[b, i].log_softmax(-1)[targets[b, i]]
                total = total + p * loss + beta * p * p.log()
                if hazard is not None:  # KL(p || prior) instead of -H(p)
                    prior = (1 - hazard) ** t * (1 if last else hazard)
                    total = total - beta * p * math.log(prior)
                means[t] = means[t] + loss
    return total, [mean / count for mean in means]


def shifted(labels: Tensor) -> Tensor:
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)


@pytest.mark.parametrize("name", list(VARIANTS))
@torch.no_grad()
def test_loss_is_equation_4(name: str) -> None:
    model = tiny_model(**VARIANTS[name])
    targets = shifted(LABELS)
    output = model(IDS, labels=LABELS, exit_beta=0.3)
    total, means = plain_objective(model, IDS, targets, 0.3)
    close(output.loss, total / int((targets != -100).sum()))
    close(output.loop_losses, torch.stack(means))


@torch.no_grad()
def test_beta_comes_from_the_configuration() -> None:
    model = tiny_model(exit_beta=0.7)
    count = int((shifted(LABELS) != -100).sum())
    close(model(IDS, labels=LABELS).loss, plain_objective(model, IDS, shifted(LABELS), 0.7)[0] / count)
    close(model(IDS, labels=LABELS, exit_beta=0.0).loss, plain_objective(model, IDS, shifted(LABELS), 0.0)[0] / count)
    with pytest.raises(ValueError, match=r"beta is -0\.1"):
        model(IDS, labels=LABELS, exit_beta=-0.1)


@torch.no_grad()
def test_geometric_prior() -> None:
    model = tiny_model(exit_prior=0.4)
    total, _ = plain_objective(model, IDS, shifted(LABELS), 0.2, hazard=0.4)
    close(model(IDS, labels=LABELS, exit_beta=0.2).loss, total / int((shifted(LABELS) != -100).sum()))


@torch.no_grad()
def test_shift_labels_are_not_shifted_again() -> None:
    model = tiny_model()
    inside, outside = model(IDS, labels=LABELS), model(IDS, shift_labels=shifted(LABELS))
    assert torch.equal(inside.loss, outside.loss) and torch.equal(inside.loop_losses, outside.loop_losses)
    assert not torch.equal(inside.loss, model(IDS, shift_labels=LABELS).loss)
    assert torch.equal(model(IDS, labels=IDS, shift_labels=shifted(LABELS)).loss, inside.loss)


@torch.no_grad()
def test_num_items_in_batch_replaces_the_number_of_tokens() -> None:
    model = tiny_model()
    total, means = plain_objective(model, IDS, shifted(LABELS), model.config.exit_beta)
    for items in (7, torch.tensor(7)):
        output = model(IDS, labels=LABELS, num_items_in_batch=items)
        close(output.loss, total / 7)
        close(output.loop_losses, torch.stack(means))
    halves = [model(IDS[b : b + 1], labels=LABELS[b : b + 1], num_items_in_batch=12).loss for b in range(2)]
    close(sum(halves), total / 12)


@torch.no_grad()
def test_masked_positions_count_for_nothing() -> None:
    model, mask = tiny_model(), torch.ones_like(IDS)
    mask[1, 6:] = 0
    padded = model(IDS, attention_mask=mask, labels=LABELS)
    changed = IDS.clone()
    changed[1, 6:] = 5
    assert torch.equal(model(changed, attention_mask=mask, labels=LABELS).loss, padded.loss)
    nothing = model(IDS, labels=torch.full_like(IDS, -100))
    assert nothing.loss == 0 and (nothing.loop_losses == 0).all() and nothing.expected_depth == 0


def test_gradients_equal_the_plain_objective() -> None:
    for name in ("plain", "all"):
        gradients = []
        for plain in (False, True):
            model = tiny_model(**VARIANTS[name])
            if plain:
                loss = plain_objective(model, IDS, shifted(LABELS), 0.3)[0] / int((shifted(LABELS) != -100).sum())
            else:
                loss = model.train()(IDS, labels=LABELS, exit_beta=0.3).loss
            loss.backward()
            gradients.append({n: p.grad for n, p in model.named_parameters()})
        for parameter, expected in gradients[1].items():
            assert expected is not None and expected.abs().max() > 0, parameter
            close(gradients[0][parameter], expected)


@torch.no_grad()
def test_fields_and_shapes() -> None:
    model = tiny_model()
    output = model(IDS, labels=LABELS)
    assert output.loss.shape == () and output.loop_losses.shape == (3,)
    assert output.exit_probabilities.shape == output.gate_logits.shape == (2, 9, 3)
    assert output.logits.shape == (2, 9, 64) and output.exit_depths.shape == (2, 9)
    close(output.exit_probabilities.sum(-1), torch.ones(2, 9))
    valid = shifted(LABELS) != -100
    depths = (output.exit_probabilities * torch.arange(1, 4)).sum(-1)
    assert output.expected_depth.shape == ()
    close(output.expected_depth, depths[valid].mean())
    close(model(IDS).expected_depth, depths.mean())
    fewer = model(IDS, labels=LABELS, num_loop_steps=2)
    assert fewer.loop_losses.shape == (2,)
    close(fewer.loop_losses, output.loop_losses[:2])
    assert torch.equal(output[0], output.loss) and torch.equal(output[1], output.logits)
    assert torch.equal(model(IDS)[0], output.logits)


@pytest.mark.parametrize("training", [True, False])
def test_logits_are_left_out_while_training_with_labels(training: bool) -> None:
    model = tiny_model().train(training)
    calls: list[object] = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    assert (model(IDS, labels=LABELS).logits is None) is training
    assert len(calls) == (0 if training else 1)
    assert model(IDS, labels=LABELS, skip_logits=True).logits is None
    assert model(IDS, labels=LABELS, skip_logits=False).logits.shape == (2, 9, 64)
    assert model(IDS).logits.shape == (2, 9, 64)


@torch.no_grad()
def test_labels_behind_a_cache_are_refused() -> None:
    model = tiny_model()
    cache = LoopCache(model.config)
    model(IDS, past_key_values=cache)
    with pytest.raises(ValueError, match="labels with 9 cached positions; pass the whole sequence"):
        model(IDS, past_key_values=cache, labels=LABELS)


def test_training_through_a_cache_is_refused() -> None:
    model = tiny_model().train()
    for arguments in ({"use_cache": True}, {"past_key_values": LoopCache(model.config)}):
        with pytest.raises(ValueError, match="use_cache is True in training"):
            model(IDS, labels=LABELS, **arguments)
    with torch.no_grad():
        assert model(IDS, labels=LABELS, use_cache=True).past_key_values.get_seq_length() == 9


def test_bad_labels() -> None:
    with pytest.raises(ValueError, match="targets span"):
        tiny_model()(IDS, labels=IDS + 64)


def test_training_step_in_bf16_autocast() -> None:
    model = tiny_model().float().train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(IDS, labels=LABELS)
    output.loss.backward()
    assert output.gate_logits.dtype == output.loss.dtype == torch.float32
    wide = tiny_model()(IDS, labels=LABELS).loss
    assert output.loss.item() == pytest.approx(wide.item(), rel=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# --- other objectives, other numbers of loops, and the losses of every token ---


@torch.no_grad()
def per_loop(model: OuroForCausalLM, loops: int) -> Tensor:
    """Cross entropy of every target after each loop (B, S, T), one full pass a loop; 0 where ignored."""
    targets = shifted(LABELS)
    losses = []
    for depth in range(1, loops + 1):
        log_p = model(IDS, num_loop_steps=depth).logits.log_softmax(-1)
        picked = -log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        losses.append(picked.masked_fill(targets == -100, 0.0))
    return torch.stack(losses, dim=-1)


@pytest.mark.parametrize("name", ["plain", "prelude-coda", "all"])
@torch.no_grad()
def test_token_losses_and_the_objectives_over_them(name: str) -> None:
    model = tiny_model(**VARIANTS[name])
    losses, valid = per_loop(model, 3), shifted(LABELS) != -100
    for objective, expected in (("last", losses[..., -1]), ("mean", losses.mean(-1))):
        output = model(IDS, labels=LABELS, objective=objective)
        close(output.loss, expected[valid].mean())
        close(output.token_losses, losses)
        close(output.loop_losses, losses[valid].mean(0))
    close(model(IDS, labels=LABELS).token_losses, losses)


@pytest.mark.parametrize("objective", ["last", "mean"])
def test_the_gate_takes_no_part_in_other_objectives(objective: str) -> None:
    for name in ("plain", "prelude-coda"):
        model = tiny_model(**VARIANTS[name]).train()
        model(IDS, labels=LABELS, objective=objective).loss.backward()
        for parameter, value in model.named_parameters():
            assert (value.grad is None) == ("early_exit_gate" in parameter), parameter


def test_gradients_of_the_last_loop_equal_those_of_its_logits() -> None:
    for name in ("plain", "all"):
        gradients = []
        for plain in (False, True):
            model = tiny_model(**VARIANTS[name]).train()
            if plain:
                logits = model(IDS, exit_at_step=2).logits.flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(logits, shifted(LABELS).flatten())
            else:
                loss = model(IDS, labels=LABELS, objective="last").loss
            loss.backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for parameter, expected in gradients[1].items():
            close(gradients[0][parameter], expected)


@pytest.mark.parametrize("loops", [1, 2, 4])
@pytest.mark.filterwarnings("error:running")
def test_training_with_other_numbers_of_loops(loops: int) -> None:
    """Equation 4 over n loops: p_n is the rest, the gate after loop n is not used, and nobody is warned of n > T."""
    model = tiny_model().train()
    output = model(IDS, labels=LABELS, num_loop_steps=loops, exit_beta=0.3)
    losses, valid = per_loop(tiny_model(total_ut_steps=4), loops), shifted(LABELS) != -100
    total = torch.zeros(IDS.shape, dtype=torch.float64)
    survival = torch.ones_like(total)
    hazards = output.gate_logits.detach().sigmoid()
    for t in range(loops):
        p = survival * hazards[..., t] if t < loops - 1 else survival
        close(output.exit_probabilities[..., t].detach(), p)
        total, survival = total + p * losses[..., t] + 0.3 * p * p.log(), survival - p
    assert output.exit_probabilities.shape == (2, 9, loops)
    close(output.loss.detach(), total[valid].mean())
    gates = torch.autograd.grad(output.loss, output.gate_logits, retain_graph=True)[0]
    assert (gates[..., -1] == 0).all() and (loops == 1 or (gates[valid][..., :-1] != 0).all())


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(ValueError, match="objective is 'best'; it must be expected, last or mean"):
        tiny_model()(IDS, labels=LABELS, objective="best")
