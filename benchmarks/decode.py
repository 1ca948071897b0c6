"""Decoding against a plain cached implementation of the released model: bytes, loops and early exit.

    python benchmarks/decode.py                  # the 250M shape: width 1024 x 12 layers, batch 1, 8 and 16
    python benchmarks/decode.py --full           # also 2048 x 24, the 1.4B shape

bf16, 4 loops, vocabulary 49,152, random weights, one thread. `plain` decodes as the released code does: a cache that
concatenates, one `F.linear` a projection, one loop after another, all of them. `generate` is ours at full depth; both
decode the same tokens in the same process, taking turns, and each figure is its best turn.

Count first: a decode step at batch 1 reads every layer's weights once a loop and the head once. For the 250M shape
that is 4 x 12 x 12.8M x 2 bytes + 49152 x 1024 x 2 bytes = 1.33 GB a token, so a core that reads 13 GB/s cannot do
more than ten tokens a second, whatever the arithmetic.

Early exit at batch 1 is compared with what it can save: (T c_loop + c_head) / (m c_loop + c_head), with the costs of a
loop and of the head measured in the same run. A confidence rule pays the head in every loop.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from functools import partial

PROMPT = 16


def main() -> None:
    """Measure the shapes and print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="also the 1.4B shape")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8, help="tokens a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 16))
    options = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    torch.set_num_threads(options.threads)
    shapes = {"250M (1024 x 12)": (1024, 12)}
    if options.full:
        shapes["1.4B (2048 x 24)"] = (2048, 24)
    for name, (width, layers) in shapes.items():
        model = shaped_model(width, layers)
        print(f"\n{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters")
        _full_depth(model, options)
        _early_exit(model, options)


def shaped_model(width, layers, **fields):  # type: ignore[no-untyped-def]
    """Random bf16 weights, 4 loops, vocabulary 49,152; `fields` of the configuration beside these."""
    import torch

    from looplm import OuroConfig, OuroForCausalLM

    torch.manual_seed(0)
    config = OuroConfig(
        hidden_size=width,
        intermediate_size=int(width * 2.75),
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        initializer_range=width**-0.5,
        **fields,
    )
    return OuroForCausalLM(config).bfloat16().eval()


def _full_depth(model, options) -> None:  # type: ignore[no-untyped-def]
    import torch

    print(f"{'batch':>6} {'plain tok/s':>12} {'ours tok/s':>11} {'speed-up':>9} {'ours GB/s':>10}")
    for batch in options.batches:
        ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT))
        plain, ours = _seconds_a_token([partial(plain_decode, model, ids), partial(_generate, model, ids)], options)
        read = _bytes_a_token(model) / ours / 1e9
        print(f"{batch:6} {batch / plain:12.1f} {batch / ours:11.1f} {plain / ours:8.2f}x {read:10.1f}")


def _early_exit(model, options) -> None:  # type: ignore[no-untyped-def]
    """Batch 1 at fixed mean depths m: measured speed-up over full depth, and what the costs of loop and head allow."""
    import torch

    from looplm.exits import Confidence, FixedDepth

    ids = torch.randint(0, model.config.vocab_size, (1, PROMPT))
    loops = model.config.total_ut_steps
    rules = [*map(FixedDepth, range(1, loops + 1)), Confidence("max_probability", 1.0)]  # the last is never sure
    *fixed, confident = _seconds_a_token([partial(_generate, model, ids, rule=rule) for rule in rules], options)
    best = dict(enumerate(fixed, start=1))
    head = _cold_seconds(model)
    loop = (best[loops] - best[1]) / (loops - 1)
    print(f"loop {loop * 1e3:.1f} ms, head {head * 1e3:.1f} ms: the head is {head / loop:.2f} of a loop")
    print(f"{'loops':>6} {'speed-up':>9} {'possible':>9} {'reached':>8}")
    for m, seconds in best.items():
        possible = (loops * loop + head) / (m * loop + head)
        print(f"{m:6} {best[loops] / seconds:8.2f}x {possible:8.2f}x {best[loops] / seconds / possible:8.0%}")
    print(f"a confidence rule that never fires: {confident / best[loops]:.2f} of the time of full depth")


def _generate(model, ids, tokens, rule=None):  # type: ignore[no-untyped-def]
    return model.generate(
        ids,
        attention_mask=ids.new_ones(ids.shape),
        exit_rule=rule,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )


def _seconds_a_token(decoders: Sequence[Callable[[int], object]], options) -> list[float]:  # type: ignore[no-untyped-def]
    """Cost of a new token without that of the prompt: the best long run less the best run of one token.

    The decoders take turns. Each run has its own best: the best *difference* would be the turn whose prompt was slow.
    """
    long, short = ([float("inf")] * len(decoders) for _ in range(2))
    for _ in range(options.turns):
        for index, decode in enumerate(decoders):
            for best, tokens in ((short, 1), (long, options.tokens + 1)):
                began = time.perf_counter()
                decode(tokens)
                best[index] = min(best[index], time.perf_counter() - began)
    return [(most - least) / options.tokens for most, least in zip(long, short, strict=True)]


def _cold_seconds(model) -> float:  # type: ignore[no-untyped-def]
    """A token's read-out (product, fp32 copy, argmax) with the head's weight out of the caches, as a loop leaves it."""
    import torch

    state = torch.randn(1, 1, model.config.hidden_size).bfloat16()
    other, seconds = torch.ones(128 << 20), []
    with torch.no_grad():
        for _ in range(6):
            other.add_(1.0)
            began = time.perf_counter()
            model.lm_head(state).float().argmax(-1)
            seconds.append(time.perf_counter() - began)
    return min(seconds)


def _bytes_a_token(model) -> int:  # type: ignore[no-untyped-def]
    layers = sum(p.numel() for p in model.model.layers.parameters())
    return 2 * (model.config.total_ut_steps * layers + model.lm_head.weight.numel())


def plain_decode(model, ids, tokens):  # type: ignore[no-untyped-def]
    """Greedy decoding as the released code does it: T x L concatenating slots, separate projections, all loops."""
    import torch
    from torch.nn.functional import linear, scaled_dot_product_attention, silu

    core, new = model.model, []
    slots: dict = {}

    def norm(module, h):  # type: ignore[no-untyped-def]
        wide = h.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
        return module.weight * wide.to(h.dtype)

    def rotate(x, cos, sin):  # type: ignore[no-untyped-def]
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def layer(block, h, cos, sin, slot, causal):  # type: ignore[no-untyped-def]
        x, attn = norm(block.input_layernorm, h), block.self_attn
        shape = (*x.shape[:2], -1, attn.head_dim)
        q, k, v = (linear(x, p.weight).view(shape).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if slot in slots:
            k, v = (torch.cat((old, added), dim=2) for old, added in zip(slots[slot], (k, v), strict=True))
        slots[slot] = (k, v)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(*x.shape[:2], -1)
        h = h + norm(block.input_layernorm_2, linear(mixed, attn.o_proj.weight))
        x, mlp = norm(block.post_attention_layernorm, h), block.mlp
        inner = silu(linear(x, mlp.gate_proj.weight)) * linear(x, mlp.up_proj.weight)
        return h + norm(block.post_attention_layernorm_2, linear(inner, mlp.down_proj.weight))

    with torch.no_grad():
        tokens_in, past = ids, 0
        for _ in range(tokens):
            h = core.embed_tokens(tokens_in)
            positions = torch.arange(past, past + tokens_in.shape[1])[None]
            cos, signed = core.rotary_emb(positions, h.dtype)
            sin = torch.cat((-signed.chunk(2, dim=-1)[0], signed.chunk(2, dim=-1)[1]), dim=-1)
            for loop in range(model.config.total_ut_steps):
                for n, block in enumerate(core.layers):
                    h = layer(block, h, cos, sin, (loop, n), tokens_in.shape[1] > 1)
                h = norm(core.norm, h)
                torch.sigmoid(core.early_exit_gate(h))
            past += tokens_in.shape[1]
            tokens_in = linear(h[:, -1:], model.lm_head.weight).argmax(-1)
            new.append(tokens_in)
    return torch.cat(new, dim=1)


if __name__ == "__main__":
    main()
