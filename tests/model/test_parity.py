"""Agreement with the released architecture: a tiny model and what the released code computed for it, in fp32."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from looplm.exits import FixedDepth, QExit
from looplm.model.modeling import OuroForCausalLM

FIXTURE = Path(__file__).parent.parent / "fixtures" / "ouro-tiny"
EXPECTED = load_file(FIXTURE / "expected.safetensors")
INPUTS = {name: EXPECTED[name] for name in ("input_ids", "attention_mask", "position_ids")}
THRESHOLDS = ["0.3", "0.5", "0.7", "0.9"]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> OuroForCausalLM:
    loaded, report = OuroForCausalLM.from_pretrained(
        FIXTURE, attn_implementation=request.param, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    assert loaded.config._attn_implementation == request.param
    return loaded.eval()


@pytest.fixture(autouse=True)
def _no_grad() -> object:
    with torch.no_grad():
        yield


def test_states_gates_and_exit_distribution(model: OuroForCausalLM) -> None:
    output = model(**INPUTS, output_hidden_states=True)
    trunk = model.model(**INPUTS)
    for loop in range(1, 5):
        close(output.hidden_states[loop], EXPECTED[f"hidden.{loop}"])
        close(trunk.loop_states[loop - 1], EXPECTED[f"hidden.{loop}"])
        close(output.gate_logits[..., loop - 1], EXPECTED[f"gate_logit.{loop}"])
    close(output.hidden_states[0], model.model.embed_tokens(INPUTS["input_ids"]))
    close(trunk.last_hidden_state, EXPECTED["hidden.4"])
    close(output.exit_probabilities, EXPECTED["exit_pdf"])
    close(output.logits, EXPECTED["logits.loop4"])
    assert (output.exit_depths == 4).all() and output.past_key_values is None


def test_the_stack_alone_loads_from_the_same_file() -> None:
    trunk, report = AutoModel.from_pretrained(FIXTURE, output_loading_info=True)
    assert report["unexpected_keys"] == {"lm_head.weight"} and not report["missing_keys"]
    close(trunk.eval()(**INPUTS).last_hidden_state, EXPECTED["hidden.4"])


@pytest.mark.parametrize("loop", [1, 2, 3, 4])
def test_logits_of_every_loop(model: OuroForCausalLM, loop: int) -> None:
    selected = model(**INPUTS, exit_at_step=loop - 1)
    close(selected.logits, EXPECTED[f"logits.loop{loop}"])
    assert (selected.exit_depths == loop).all()
    short = model(**INPUTS, num_loop_steps=loop)
    close(short.logits, EXPECTED[f"logits.loop{loop}"])
    assert short.gate_logits.shape == (2, 16, loop) and (short.exit_depths == loop).all()


@pytest.mark.parametrize("q", THRESHOLDS)
def test_q_exit(model: OuroForCausalLM, q: str) -> None:
    output = model(**INPUTS, exit_threshold=float(q))
    close(output.logits, EXPECTED[f"logits.q{q}"])
    reached = EXPECTED["exit_pdf"].cumsum(-1)[..., :3] >= float(q)
    depths = torch.where(reached.any(-1), reached.int().argmax(-1) + 1, 4)
    assert torch.equal(output.exit_depths, depths)


def test_the_thresholds_of_the_fixture_use_every_loop(model: OuroForCausalLM) -> None:
    depths = [model(**INPUTS, exit_threshold=float(q)).exit_depths for q in THRESHOLDS]
    assert set(torch.cat(depths).unique().tolist()) == {1, 2, 3, 4}


def test_thresholds_one_a_row(model: OuroForCausalLM) -> None:
    output = model(**INPUTS, exit_threshold=torch.tensor([0.3, 0.9]))
    close(output.logits[0], EXPECTED["logits.q0.3"][0])
    close(output.logits[1], EXPECTED["logits.q0.9"][1])


def test_weighted_exit(model: OuroForCausalLM) -> None:
    mixed = sum(EXPECTED["exit_pdf"][..., t, None] * EXPECTED[f"logits.loop{t + 1}"] for t in range(4))
    output = model(**INPUTS, use_weighted_exit=True)
    torch.testing.assert_close(output.logits, mixed, rtol=1e-5, atol=2e-5)
    assert output.exit_depths is None


def test_precedence_of_the_released_arguments(model: OuroForCausalLM) -> None:
    everything = {"exit_at_step": 0, "exit_threshold": 0.7, "use_weighted_exit": True}
    close(model(**INPUTS, exit_rule=FixedDepth(2), **everything).logits, EXPECTED["logits.loop2"])
    close(model(**INPUTS, **everything).logits, EXPECTED["logits.loop1"])
    del everything["exit_at_step"]
    close(model(**INPUTS, **everything).logits, EXPECTED["logits.q0.7"])
    weighted = model(**INPUTS, use_weighted_exit=True).logits
    model.config.early_exit_threshold = 0.5
    try:
        close(model(**INPUTS).logits, EXPECTED["logits.q0.5"])
        close(model(**INPUTS, exit_threshold=1.0).logits, EXPECTED["logits.loop4"])
        close(model(**INPUTS, use_weighted_exit=True).logits, weighted)
    finally:
        model.config.early_exit_threshold = 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exit_at_step": 4}, r"exit_at_step is 4; it is 0-based and must lie in 0\.\.3"),
        ({"exit_at_step": -1}, "exit_at_step is -1"),
        ({"exit_at_step": 2, "num_loop_steps": 2}, r"exit_at_step is 2; .* 0\.\.1"),
        ({"exit_threshold": 0.0}, "exit_threshold is 0.0"),
        ({"exit_threshold": 1.2}, "exit_threshold is 1.2"),
        ({"exit_threshold": torch.tensor([0.5, 0.5, 0.5])}, r"3 values.* 2 rows"),
        ({"exit_threshold": torch.tensor([0.5])}, r"1 values.* 2 rows"),
        ({"num_loop_steps": 0}, "num_loop_steps is 0"),
    ],
)
def test_bad_values(model: OuroForCausalLM, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**INPUTS, **arguments)


def test_cached_greedy_decoding(model: OuroForCausalLM) -> None:
    cache, ids, mask = None, INPUTS["input_ids"], INPUTS["attention_mask"]
    logits, tokens = [], []
    for _ in range(9):
        output = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = output.past_key_values, output.logits.argmax(-1)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        logits.append(output.logits)
        tokens.append(ids)
    close(torch.cat(logits, dim=1), EXPECTED["greedy.logits"])
    assert torch.equal(torch.cat(tokens[:8], dim=1), EXPECTED["greedy.tokens"])
    assert cache.get_seq_length() == 24 and cache.num_loops == 4
    assert cache.num_bytes == 2 * 4 * 2 * 2 * 24 * 64 * 4  # K and V x loops x layers x rows x positions x width x fp32


def test_generate_greedily(model: OuroForCausalLM) -> None:
    inputs = {name: INPUTS[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": -1}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    for depth in ({}, {"adaptive_loop": True}, {"exit_threshold": 1.0}, {"adaptive_loop": False, "num_loop_steps": 4}):
        result = model.generate(**inputs, **settings, **depth)
        close(torch.stack(result.logits, dim=1), EXPECTED["greedy.logits"])
        assert torch.equal(result.sequences[:, 16:24], EXPECTED["greedy.tokens"])
        assert result.exit_depths.shape == (2, 9) and (result.exit_depths == 4).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_threshold_one_reads_the_last_loop_everywhere_in_reduced_precision(dtype: torch.dtype) -> None:
    model = OuroForCausalLM.from_pretrained(FIXTURE, dtype=dtype).eval()
    model.model.early_exit_gate.weight.data *= 40  # hazards that round to 1 in reduced precision
    last = model(**INPUTS, exit_at_step=3)
    assert last.gate_logits.dtype == last.exit_probabilities.dtype == torch.float32
    assert last.gate_logits.max() > 40 and last.logits.dtype == dtype
    assert (last.exit_probabilities.to(dtype).cumsum(-1)[..., 2] >= 1).any(), "the released arithmetic would exit"
    for arguments in ({}, {"exit_threshold": 1.0}, {"exit_threshold": torch.ones(2)}, {"exit_rule": QExit(1.0)}):
        output = model(**INPUTS, **arguments)
        assert (output.exit_depths == 4).all() and torch.equal(output.logits, last.logits)
