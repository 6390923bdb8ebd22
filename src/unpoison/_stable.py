"""Cross-entropy whose gradient does not vanish by rounding where the label has nearly all probability.

With logits z and label y, cross-entropy is `softplus(m)` of the margin

    m = logsumexp_{c != y} z_c - z_y,

and its gradient in z is `sigmoid(m)` times (the softmax of the other logits, and -1 at y), so the label's
entry is minus the sum of the others. The textbook form, softmax minus one-hot, computes p_y - 1 instead. In
float32 this is exactly 0 once the other classes have less than 6e-8 together, while their entries remain: the
gradient then points in a wrong direction. That matters to whatever does not depend on the gradient's length:
cosines, signs, ranks and normalised scores.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Float[...]: the log-sum-exp of the other logits minus the label's: the log-odds against the label.

    Its gradient is that of cross-entropy divided by one minus the label's probability, and so never vanishes.
    Computed in float32 where logits have a lower precision.

    Arguments:
        logits: Float[... classes], two classes or more.
        labels: Int64[...], in 0..classes-1.

    >>> margin(torch.tensor([[0.0, 40.0]]), torch.tensor([1]))
    tensor([-40.])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labelled = torch.arange(logits.shape[-1], device=logits.device) == labels.unsqueeze(-1)
    others = logits.masked_fill(labelled, -torch.inf).logsumexp(-1)
    return others - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def margins(logits: Tensor) -> Tensor:
    """Float[... classes]: the `margin` of every label.

    Arguments:
        logits: Float[... classes], two classes or more.

    >>> margins(torch.tensor([[0.0, 40.0]]))
    tensor([[ 40., -40.]])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = logits.argmax(-1, keepdim=True)
    # Of all labels but the likeliest one the probability is at most a half, so log1p loses nothing.
    others = logits.logsumexp(-1, keepdim=True) + torch.log1p(-logits.softmax(-1).clamp(max=0.5))
    of_largest = logits.scatter(-1, largest, -torch.inf).logsumexp(-1, keepdim=True)
    return others.scatter(-1, largest, of_largest) - logits


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    reduction: Literal["none", "mean", "sum"] = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """As `torch.nn.functional.cross_entropy`, with accurate first and second derivatives everywhere.

    Works under `torch.func` (vmap, grad, jvp). Float32 at least, also for logits of a lower precision.

    Arguments:
        logits: Float[... classes]; classes come last, whatever the number of dimensions.
        labels: Int64[...].
        reduction: "none" gives Float[...], "mean" and "sum" a scalar.
        label_smoothing: share of the label that is spread over all classes, in [0, 1).

    >>> f"{float(cross_entropy(torch.tensor([[0.0, 40.0]]), torch.tensor([1]))):.3g}"
    '4.25e-18'
    """
    # Beyond its threshold softplus(x) is x; the default of 20 would show in float64.
    losses = F.softplus(margin(logits, labels), threshold=50)
    if label_smoothing:
        logits = logits.to(losses.dtype)
        uniform = logits.logsumexp(-1) - logits.mean(-1)
        losses = losses.lerp(uniform, label_smoothing)
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def softmax_minus_one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    """Float[... classes]: the gradient of each example's cross-entropy in its logits.

    The label's entry is minus the sum of the others. Float32 at least, also for logits of a lower precision.

    Arguments:
        logits: Float[... classes], two classes or more.
        labels: Int64[...], in 0..classes-1.

    >>> softmax_minus_one_hot(torch.tensor([[0.0, 40.0]]), torch.tensor([1]))
    tensor([[ 4.2484e-18, -4.2484e-18]])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labelled = torch.arange(logits.shape[-1], device=logits.device) == labels.unsqueeze(-1)
    others = logits.softmax(-1).masked_fill(labelled, 0)
    return others - others.sum(-1, keepdim=True) * labelled
