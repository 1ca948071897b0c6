"""The state of a run: which tensors it has, and that a checkpoint gives all of it back."""

import copy

import pytest
import torch
from small_run import small_model

from looplm.training.checkpoint import Checkpoint, Checkpoints
from looplm.training.recipe import StageDefaults
from looplm.training.state import TrainingState
from looplm.training.trainer import build_optimizer


def new_state(seed: int, **fields) -> TrainingState:
    torch.manual_seed(seed)
    model = small_model(**fields)
    return TrainingState(model, build_optimizer(model, StageDefaults(weight_decay=0.1)))


def update(state: TrainingState, frozen: str = "") -> None:
    for name, parameter in state.model.named_parameters():
        if name != frozen:
            parameter.grad = torch.sin(parameter.detach() * 50 + state.step)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1


def saved(folder, state: TrainingState) -> Checkpoint:
    checkpoints = Checkpoints(folder)
    checkpoints.save("1", state.tensors(), {"training": state.plain()})
    checkpoints.wait()
    return checkpoints.newest(pytest.fail)


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_once_and_moments_only_where_there_are_some(tied):
    state = new_state(0, tie_word_embeddings=tied)
    weights = {f"model.{name}" for name in state.model.state_dict()} - ({"model.lm_head.weight"} if tied else set())
    assert set(state.tensors()) == weights
    gate = "model.early_exit_gate.weight"
    update(state, frozen=gate)
    moments = {name for name in state.tensors() if name.startswith("optimizer.")}
    assert moments == {
        f"optimizer.{name.removeprefix('model.')}.{field}"
        for name in weights - {f"model.{gate}"}
        for field in ("step", "exp_avg", "exp_avg_sq")
    }


def test_a_checkpoint_gives_everything_back(tmp_path):
    state = new_state(0)
    for _ in range(3):
        update(state, frozen="model.early_exit_gate.bias")
    state.tokens, state.skipped, state.health.entropy = 7, [2], 0.25
    checkpoint, expected = saved(tmp_path, state), copy.deepcopy(state)
    for other in (new_state(1), state):  # a fresh process; and going back, after more steps
        update(other)
        other.load(checkpoint)
        assert other.plain() == expected.plain()
        assert other.tensors().keys() == expected.tensors().keys()
        reference = copy.deepcopy(expected)
        update(other), update(reference)
        assert all(torch.equal(tensor, reference.tensors()[name]) for name, tensor in other.tensors().items())
        assert [group["weight_decay"] for group in other.optimizer.param_groups] == [0.1, 0.0]


def test_a_model_of_another_shape_is_refused(tmp_path):
    checkpoint = saved(tmp_path, new_state(0))
    with pytest.raises(ValueError, match=r"the shape of '.*' is \(.*\), not \("):
        new_state(0, hidden_size=16).load(checkpoint)
    with pytest.raises(ValueError, match=r"has no tensor 'model\.model\.layers\.2"):
        new_state(0, num_hidden_layers=3).load(checkpoint)
