"""`adversarially_trained`: a surrogate whose loss rises where the content of an image changes.

Madry, Makelov, Schmidt, Tsipras and Vladu 2018, "Towards Deep Learning Models Resistant to Adversarial
Attacks" (ICLR; arXiv 1706.06083): each step trains on images that projected gradient ascent has moved away
from their class. Published for CIFAR-10: 7 steps of 2/255 within 8/255.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from unpoison._global_randomness import own_randomness
from unpoison._progress import Progress
from unpoison._seeds import derive_seed, generator
from unpoison.attacks._networks import frozen
from unpoison.attacks.label_consistent import ascended
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import device_of, logits_of


def adversarially_trained(
    model: nn.Module,
    training_set: TrainingSet,
    *,
    epochs: int = 10,
    eps: float = 8.0,
    step: float = 2.0,
    steps: int = 7,
    batch_size: int = 128,
    learning_rate: float = 0.01,
    seed: int,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of `model`, trained further on adversarial examples; give one that is trained as usual.

    SGD with momentum 0.9, weight decay 5e-4 and a rate that falls linearly to zero. Costs `steps` + 1 times
    as much as usual training.

    Arguments:
        model: takes Float[b c h w] in [0, 1]; left as it is.
        training_set: what to train on.
        epochs: passes over the set, 1 or more.
        eps: how far images are moved in 1/255.
        step: of the ascent in 1/255.
        steps: of the ascent, 1 or more.
        batch_size: images in a step, 2 or more.
        learning_rate: the first and greatest, above 0.
        seed: of the order and of the first changes.
        progress: called after every epoch, at the stage "training".

    Returns:
        The copy, in eval mode.

    Raises:
        InputError: a number is out of range, or the set is empty.
    """
    if (
        min(epochs, steps) < 1
        or batch_size < 2
        or not learning_rate > 0
        or not 0 < eps <= 255
        or not step > 0
    ):
        raise InputError(
            f"adversarially_trained: epochs {epochs}, steps {steps}, batch_size {batch_size}, learning_rate "
            f"{learning_rate}, eps {eps}, step {step}: one of them is out of range"
        )
    if not len(training_set):
        raise InputError(f"{training_set.name}: is empty; there is nothing to train on")
    network = copy.deepcopy(model)
    device = device_of(network, training_set.device)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9, weight_decay=5e-4)
    draws = generator(seed, "adversarially trained")
    batches = max(1, len(training_set) // batch_size)
    network_seed = derive_seed(seed, "adversarially trained", "network")
    with own_randomness(device, seed=network_seed), torch.enable_grad():
        for epoch in range(epochs):
            order = torch.randperm(len(training_set), generator=draws)
            for batch in range(batches):
                chosen = training_set.subset(order[batch * batch_size : (batch + 1) * batch_size]).to(device)
                start = torch.rand(chosen.images.shape, generator=draws) * 2 - 1
                # In eval mode: the ascent must not move the statistics of batch norm.
                with frozen([network]):
                    change = ascended(
                        [network],
                        chosen.images,
                        chosen.labels,
                        start * eps,
                        eps=eps,
                        step=step,
                        steps=steps,
                    )
                network.train()
                logits = logits_of(network, (chosen.images.float() + change) / 255)
                loss = F.cross_entropy(logits, chosen.labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * (1 - (epoch * batches + batch) / (epochs * batches))
                optimizer.step()
            if progress is not None:
                progress("training", epoch + 1, epochs, loss=float(loss.detach()))
    network.zero_grad(set_to_none=True)
    return network.eval()
