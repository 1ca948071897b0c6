"""pass@k: a problem asked several times.

pass@k is the chance that one of k samples is right, estimated without bias from n samples of which c are:
1 - C(n - c, k) / C(n, k) (Chen et al., 2021, equation 1). The paper reports pass@1 for code, and pass@1 and pass@10 for
AIME (Tables 7 to 9).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.task import ConfigurableTask

_KS = (1, 10)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of the n samples hold a right one.

    Raises:
        ValueError: k outside 1..n, or c outside 0..n.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(
            f"pass@{k} of {right} right among {samples}: k must lie in 1..{samples}, and right in 0..{samples}"
        )
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def passes(samples: int, right: int) -> dict[str, float]:
    """pass@1, and pass@10 of ten samples or more, by name; raises ValueError as `pass_at_k`."""
    return {f"pass@{k}": pass_at_k(samples, right, k) for k in _KS if k <= samples}


def samples_of(results: Sequence[Any]) -> list[str]:
    """The texts of a problem as lm-eval hands them to `process_results` behind the filter of `repeated`."""
    return results[0] if isinstance(results[0], list) else list(results)


def repeated(samples: int) -> dict[str, Any]:
    """The fields of a task's configuration that ask each problem so many times and score it by `passes`."""
    return {
        "repeats": samples,
        "filter_list": [{"name": "none", "filter": [{"function": "take_first_k", "k": samples}]}],
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in passes(samples, 0)],
    }


def sampled_task(task: ConfigurableTask, samples: int) -> ConfigurableTask:
    """The same questions, prompts and check of an answer, asked so many times each and scored by `passes`.

    Args:
        task: one that scores a text by `exact_match`; its `generation_kwargs` say how samples are drawn.
        samples: of each problem; pass@10 needs ten.
    """
    data = task.dataset

    def judged(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
        texts = samples_of(results)
        right = sum(bool(task.process_results(doc, [text])["exact_match"]) for text in texts)
        return passes(len(texts), right)

    config = task.config.to_dict(keep_callable=True)
    return ConfigurableTask(
        config={**config, "custom_dataset": lambda **_: data, "process_results": judged, **repeated(samples)}
    )
