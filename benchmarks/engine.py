"""The engine against `generate` on the same requests, at full depth and with exits drawn at random.

    python benchmarks/engine.py                  # the 250M shape: width 1024 x 12 layers, 1, 8 and 16 requests

bf16, 4 loops, vocabulary 49,152, random weights, one thread. All requests start together and give as many tokens; the
two take turns in one process, and each figure is its best turn, prompts not counted. `generate` waits at every token
until its deepest row is through; the engine does not. `possible` is what the engine could reach over its own full
depth with a mean depth of m: (T c_loop + c_head) / (m (c_loop + c_head)), with the costs measured in the run. The
exits are `SampledExit` on a gate that is pinned, so both draw the same depths.
"""

import argparse
import os
import time


def main() -> None:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--requests", type=int, nargs="+", default=(1, 8, 16))
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    torch.set_num_threads(1)
    model = _model(options.width, options.layers)
    print(
        f"{'requests':>8} {'exits':>8} {'depth':>6} {'engine / generate':>18} {'/ own full depth':>17} {'possible':>9}"
    )
    for requests in options.requests:
        prompts = torch.randint(3, model.config.vocab_size, (requests, options.prompt))
        best: dict[tuple[str, bool], float] = {}
        outside = depth = 0.0
        for _ in range(options.turns):
            for sampled in (False, True):
                seconds, mean, share = _engine(model, prompts, options.tokens, sampled)
                best["engine", sampled] = min(seconds, best.get(("engine", sampled), seconds))
                depth, outside = (mean, outside) if sampled else (depth, share)
                seconds = _generate(model, prompts, options.tokens, sampled)
                best["generate", sampled] = min(seconds, best.get(("generate", sampled), seconds))
        loop, head = _costs(model, best["engine", False], requests)
        loops = model.config.total_ut_steps
        possible = (loops * loop + head) / (depth * (loop + head))
        for sampled, mean, ideal in ((False, float(loops), 1.0), (True, depth, possible)):
            ratio = best["generate", sampled] / best["engine", sampled]
            gain = best["engine", False] / best["engine", sampled]
            kind = "drawn" if sampled else "none"
            print(f"{requests:8} {kind:>8} {mean:6.2f} {ratio:17.2f}x {gain:16.2f}x {ideal:8.2f}x")
        print(f"{'':8} outside the model's passes at full depth: {outside:.1%}")


def _model(width, layers):  # type: ignore[no-untyped-def]
    import torch

    from looplm import OuroConfig, OuroForCausalLM

    torch.manual_seed(0)
    config = OuroConfig(
        hidden_size=width,
        intermediate_size=int(width * 2.75),
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        initializer_range=width**-0.5,
    )
    model = OuroForCausalLM(config).bfloat16().eval()
    with torch.no_grad():
        model.model.early_exit_gate.weight.zero_()
        model.model.early_exit_gate.bias.fill_(-0.4)  # a hazard of 0.4: the mean depth is 2.2
    return model


def _engine(model, prompts, tokens, sampled):  # type: ignore[no-untyped-def]
    """Seconds a token of every request, the mean depth, and the share of the time outside the model's passes."""
    from looplm import Engine, SamplingParams
    from looplm.exits import SampledExit

    engine = Engine(model, kv_bytes=1 << 30, max_rows=len(prompts), prefix_cache=False)
    sequences = []
    for seed, prompt in enumerate(prompts.tolist()):
        rule = SampledExit(seed) if sampled else None
        sequences += engine.prepare(prompt, SamplingParams(max_tokens=tokens + 1, exit_rule=rule, ignore_eos=True))
        engine.submit(sequences[-1:])
    while not all(sequence.new for sequence in sequences):
        engine.step()
    began, inside = time.perf_counter(), engine.runner.model_seconds
    while engine.busy:
        engine.step()
    seconds = time.perf_counter() - began
    depths = [depth for sequence in sequences for depth in sequence.exit_depths[1:]]
    return seconds / tokens, sum(depths) / len(depths), 1 - (engine.runner.model_seconds - inside) / seconds


def _generate(model, prompts, tokens, sampled):  # type: ignore[no-untyped-def]
    """Seconds a step of the whole batch, the prompt's time taken off."""
    import torch

    from looplm.exits import SampledExit

    rule, times = SampledExit(torch.arange(len(prompts))) if sampled else None, []
    for number in (1, tokens + 1):
        began = time.perf_counter()
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            exit_rule=rule,
            max_new_tokens=number,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        times.append(time.perf_counter() - began)
    return (times[1] - times[0]) / tokens


def _costs(model, full, requests):  # type: ignore[no-untyped-def]
    """Seconds of a loop and of the read-out of a quarter of the rows, from a full-depth token's and the head alone."""
    import torch

    state = torch.randn(max(requests // 4, 1), 1, model.config.hidden_size).bfloat16()
    other, seconds = torch.ones(64 << 20), []
    with torch.no_grad():
        for _ in range(5):
            other.add_(1.0)
            began = time.perf_counter()
            model.lm_head(state).float().argmax(-1)
            seconds.append(time.perf_counter() - began)
    head = min(seconds)
    return (full - head) / model.config.total_ut_steps, head


if __name__ == "__main__":
    main()
