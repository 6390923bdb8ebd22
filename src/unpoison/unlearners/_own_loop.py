"""Healing by a training function of the user's own, which sees the kept examples alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from unpoison.data import Examples, TrainingSet
from unpoison.errors import InputError
from unpoison.models import check_outputs, device_of, usual_mode
from unpoison.training import Trained

OwnTraining = Callable[[list[int], "Subset[Any]"], "nn.Module | Trained"]
"""From the ascending indices of the kept examples, and the dataset that was given at these indices, to a
trained network."""


def retrain_with(
    function: OwnTraining,
    model: nn.Module,
    dataset: Any,
    examples: Examples,
    forget: Tensor | Sequence[int],
    *,
    lose_classes: bool = False,
    seed: int = 0,
    adapted: Callable[[nn.Module], nn.Module] = lambda network: network,
) -> Trained:
    """The network that the function trains on the examples that are kept.

    Arguments:
        function: is called once, as `function(kept, subset)`. `kept` are the indices of the kept examples
            into the dataset, a list of int in ascending order. `subset` is a
            `torch.utils.data.Subset(dataset, kept)` of the very dataset that was given, with its transforms;
            nothing is copied. It returns another network than the model, or a `Trained`.
        model: the network to heal; is not changed, and is not given to the function.
        dataset: what the function knows: has `len()` and `[index]`.
        examples: the same as this package reads it.
        forget: the examples to forget: indices in any order, or a mask Bool[n].
        lose_classes: allow that a class is left without examples.
        seed: is stored in the result; the function seeds itself.
        adapted: the network as it takes the inputs of `examples` and returns logits.

    Raises:
        InputError: there is nothing to forget or to keep, a class would be lost, or the function returns no
            network, the model itself, or one that does not fit the examples.
    """
    started = time.perf_counter()
    kept = kept_indices(examples, forget, lose_classes=lose_classes)
    indices: list[int] = kept.tolist()
    # The function is the caller's, and so are the modes that it runs in.
    trained = function(indices, Subset(dataset, indices))
    network = trained.model if isinstance(trained, Trained) else trained
    if not isinstance(network, nn.Module):
        raise InputError(f"retrain: returned {type(network).__name__}; return the trained network")
    if network is model:
        raise InputError("retrain: returned the model that is to be healed; train a new network or a copy")
    with usual_mode(device_of(network)):
        check_outputs(adapted(network), examples.batch(0, 64)[0], classes=examples.num_classes)
    if isinstance(trained, Trained):
        return trained
    shape = examples.input_shape
    return Trained(
        model=network.eval(),
        recipe=None,
        seed=seed,
        class_names=tuple(examples.class_names),
        image_shape=tuple(shape) if isinstance(shape, tuple) else (),
        training_fingerprint=examples.subset(kept).fingerprint,
        seconds=time.perf_counter() - started,
        own_model=True,
    )


def kept_indices(
    examples: Examples, forget: Tensor | Sequence[int], *, lose_classes: bool, method: str = "retrain"
) -> Tensor:
    """Int64[k], ascending: the examples that are not to be forgotten.

    Raises:
        InputError: there is nothing to forget or to keep, an index is out of range, or a class would be lost.
    """
    count, chosen = len(examples), torch.as_tensor(forget)
    if isinstance(examples, TrainingSet):
        chosen = examples.indices(chosen)
    elif chosen.dtype == torch.bool:
        if chosen.shape != (count,):
            raise InputError(f"{method}: a mask must be of shape [{count}], found {tuple(chosen.shape)}")
        chosen = chosen.nonzero()[:, 0]
    elif chosen.is_floating_point() and chosen.numel():
        raise InputError(f"{method}: indices must be whole numbers, found {chosen.dtype}")
    chosen = torch.unique(chosen.to(device="cpu", dtype=torch.int64))
    if not len(chosen):
        raise InputError(f"{method}: there is nothing to forget")
    if int(chosen[0]) < 0 or int(chosen[-1]) >= count:
        raise InputError(
            f"{method}: example {int(chosen[0] if chosen[0] < 0 else chosen[-1])} is outside 0..{count - 1}"
        )
    mask = torch.ones(count, dtype=torch.bool)
    mask[chosen] = False
    if not bool(mask.any()):
        raise InputError(f"{method}: all {count} examples of {examples.name} are to be forgotten")
    labels = examples.labels.cpu()
    before, after = (torch.bincount(one, minlength=examples.num_classes) for one in (labels, labels[mask]))
    lost = ((before > 0) & (after == 0)).nonzero()[:, 0].tolist()
    if lost and not lose_classes:
        named = ", ".join(f"{label} ({examples.class_names[label]})" for label in lost)
        raise InputError(
            f"{method}: forgetting {len(chosen)} examples leaves none of class {named}; forget fewer, "
            "or allow it with lose_classes"
        )
    return mask.nonzero()[:, 0]
