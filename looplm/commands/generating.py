"""`looplm generate`: text with the depth of every token."""

from typing import Annotated, Literal

from tyro.conf import Positional, arg


def generate(
    model: Annotated[Positional[str], arg(help="a model folder or hub name")],
    prompt: Annotated[str, arg(help="text to continue")],
    exit_threshold: Annotated[
        float | None, arg(help="leave the loop at this CDF, in (0, 1]; without: all loops")
    ] = None,
    depth_budget: Annotated[float | None, arg(help="steer the threshold to this mean number of loops a token")] = None,
    loops: Annotated[int | None, arg(help="a fixed number of loops instead")] = None,
    kv_policy: Annotated[
        Literal["per_loop", "last", "average", "first"], arg(help="keys kept after the prompt: every loop's, or one")
    ] = "per_loop",
    max_new_tokens: Annotated[int, arg(help="tokens to generate at most")] = 100,
    temperature: Annotated[float, arg(help="0 is greedy")] = 0.7,
    top_p: Annotated[float, arg(help="nucleus, in (0, 1]")] = 0.9,
    seed: Annotated[int, arg(help="of the sampling")] = 0,
    json: Annotated[bool, arg(help="print tokens and depths as JSON")] = False,
) -> None:
    """Continue a prompt and show the depth of every token."""
    _check_generate(exit_threshold, depth_budget, loops, max_new_tokens, temperature, top_p, seed)
    from looplm.model.loading import load_model
    from looplm.model.text import continue_text

    looped, tokenizer = load_model(model)
    text = continue_text(
        looped,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        exit_threshold=exit_threshold,
        depth_budget=depth_budget,
        num_loop_steps=loops,
        kv_policy=kv_policy,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    _show(text.prompt, text.tokens, text.mean_depth, loops or looped.config.total_ut_steps, json, depth_budget)


def _check_generate(
    exit_threshold: float | None,
    depth_budget: float | None,
    loops: int | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> None:
    depths = {"--exit-threshold": exit_threshold, "--depth-budget": depth_budget, "--loops": loops}
    given = [flag for flag, value in depths.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} exclude each other: choose one way to set the depth")
    if exit_threshold is not None and not 0 < exit_threshold <= 1:
        raise ValueError(f"--exit-threshold is {exit_threshold}; it must lie in (0, 1]")
    if loops is not None and loops < 1:
        raise ValueError(f"--loops is {loops}; it must be at least 1")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {max_new_tokens}; it must be at least 1")
    if temperature != 0 and not 0.01 <= temperature <= 100:
        raise ValueError(f"--temperature is {temperature}; it must be 0 (greedy) or lie in [0.01, 100]")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p is {top_p}; it must lie in (0, 1]")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed is {seed}; it must lie in 0..{2**32 - 1}")


def _show(
    prompt: str, tokens: list[tuple[str, int]], mean_depth: float, loops: int, as_json: bool, budget: float | None
) -> None:
    import json as json_module

    from rich.console import Console
    from rich.text import Text

    from looplm.display import depth_legend, depth_plain, depth_text

    if as_json:
        pieces = [{"text": text, "depth": depth} for text, depth in tokens]
        print(json_module.dumps({"prompt": prompt, "tokens": pieces, "mean_depth": mean_depth}))
        return
    console = Console()
    if console.color_system is None:
        print(prompt + depth_plain(tokens))
    else:
        console.print(depth_legend(loops))
        console.print(Text(prompt), depth_text(tokens, loops), sep="", soft_wrap=True)
    asked = "" if budget is None else f" (asked for {budget:g})"
    console.print(f"{mean_depth:.2f} loops a token{asked}", highlight=False)
