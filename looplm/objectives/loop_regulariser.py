"""The loop regulariser: an unlooped stack is drawn towards a looped one (Saunshi et al., arXiv 2502.17416, eq. of R_G).

For a stack of L layers and a block of k of them, layer l and layer l + k should be alike. For every group G of weight
matrices (query, key, value, output, gate, up, down), with theta_l the flattened matrix of layer l,

    R_G(k) = 1 / (L - k) * sum_{l=1}^{L-k} cos(theta_l, theta_{l+k})
    loss  += weight * (1 - mean_G R_G(k))

The paper prints `+ weight * mean_G R_G(k)`, which, minimised, would push the blocks apart; it means the opposite, as
its final cosines of 0.98 show. The 1 shifts the term to [0, 2], with 0 where the stack is a block of k layers looped
L / k times. The cosine does not see the scale of a matrix; norms and embeddings are in no group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from looplm.objectives.settings import LoopRegulariserSettings


def loop_regulariser(layers: Sequence[nn.Module] | nn.ModuleList, settings: LoopRegulariserSettings) -> Tensor:
    """The term to add to a step's loss: weight * (1 - mean_G R_G(k)).

    Args:
        layers: the stack, L modules with the same parameters; for an `OuroForCausalLM`, `model.model.layers`. The
            stack may itself be looped; the paper's is not.
        settings: block and weight.

    Returns:
        Scalar, fp32 (fp64 for fp64 weights), differentiable in every matrix of the stack.

    Raises:
        ValueError: the block does not divide L, or is all of it.
    """
    distance, depth = settings.block, len(layers)
    if depth % distance or distance == depth:
        raise ValueError(f"block is {distance}; it must divide the number of layers, {depth}, and be below it")
    groups = [name for name, parameter in layers[0].named_parameters() if parameter.ndim == 2]
    similarities = [_similarity([layer.get_parameter(name) for layer in layers], distance) for name in groups]
    return settings.weight * (1 - torch.stack(similarities).mean())


def _similarity(matrices: Sequence[Tensor], distance: int) -> Tensor:
    """R_G(k) of one group: the mean cosine of the L - k pairs that are `distance` apart."""
    flat = [m.flatten() if m.dtype == torch.float64 else m.flatten().float() for m in matrices]
    pairs = zip(flat[:-distance], flat[distance:], strict=True)
    return torch.stack([cosine_similarity(a, b, dim=0) for a, b in pairs]).mean()
