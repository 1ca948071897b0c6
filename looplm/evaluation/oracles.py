"""What the best choice of exits could do: two oracles over the read-outs of one full pass (Ouro Figure 5 has none).

Both choose a loop for each position among states of the *same* plain pass, in which no position is frozen. They look at
what no rule may look at.

    agreement   the earliest loop whose prediction is the last loop's, and stays it: min {t : y_s = y_T for all s >= t}
    hindsight   the earliest loop that is right; loop 1 where none is, since nothing is to be gained there

Hindsight bounds selection: no choice of a loop for each position is right more often, and none that is right as often
has a smaller mean depth. It bounds nothing else: a rule that freezes positions changes the states of later ones, and a
position frozen at a good loop may lead to better ones than any of this pass.
"""

from torch import Tensor


def agreement_depths(predictions: Tensor) -> Tensor:
    """The earliest loop from which on the prediction is the last one's, (N,) int64 in 1..T.

    Args:
        predictions: (N, T) int64, what is predicted after every loop.
    """
    same = predictions == predictions[:, -1:]
    return 1 + predictions.shape[1] - same.flip(1).long().cumprod(1).sum(1)


def hindsight_depths(right: Tensor) -> Tensor:
    """The earliest right loop, 1 where none is, (N,) int64 in 1..T.

    Args:
        right: (N, T) bool, whether the prediction after every loop is right.
    """
    return 1 + right.long().argmax(1)  # argmax takes the first of equals


def read_at(values: Tensor, depths: Tensor) -> Tensor:
    """Of (N, T) values those of each position's own loop (N,), counted from 1."""
    return values.gather(1, depths[:, None] - 1)[:, 0]
