"""`Probe`: notes before each epoch of a victim's training what the pictures of the papers show.

It stands in front of the victim's defense, if there is one, and changes nothing. What it can note:

- "logits": the mean logits of the adversary's inputs, and the share of them that is answered as wanted;
- "gradients": where poisons and the clean examples of their classes lie among the logit gradients (softmax
  minus one-hot of the label): an example is *effective* when it is nearer to the target's adversarial
  gradient, softmax minus one-hot of the wanted class, than to the mean of the clean examples of its class
  (the picture of EPIC's paper, Yang, Liu and Mirzasoleiman 2022). Once the target is answered as wanted its
  adversarial gradient lies within that class, and the comparison says nothing;
- "norms": of the mean gradient over all parameters in eval mode, and of its difference from that of the
  examples a defense keeps.

What the defense has dropped so far is always noted. Cost: one forward pass over the training set an epoch for
"gradients", one more epoch an epoch for "norms".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unpoison._stable import softmax_minus_one_hot
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.models import preserved
from unpoison.threats import PoisonSet
from unpoison.training import Batch, Defense, Recipe, Step, Trained, predict

_BATCH: Final = 512
Notes = dict[str, Any]


@final
@dataclass(frozen=True)
class Undefended(Defense):
    """Every hook as it is by default."""


@final
@dataclass(eq=False)
class Probe(Defense):
    """Leaves the work to another defense and takes notes.

    Arguments:
        inner: that defense.
        poison: the truth.
        test_set: where the adversary's inputs come from.
        quantities: what to note, of "logits", "gradients" and "norms".
    """

    inner: Defense
    poison: PoisonSet = field(repr=False)
    test_set: TrainingSet = field(repr=False)
    quantities: tuple[str, ...]

    def begin(self, training_set: TrainingSet, recipe: Recipe, *, seed: int) -> TrainingSet:
        self._notes: list[Notes] = []
        self._training_set = self.inner.begin(training_set, recipe, seed=seed)
        return self._training_set

    def keep(self, epoch: int, model: nn.Module, training_set: TrainingSet, alive: Tensor) -> Tensor:
        kept = self.inner.keep(epoch, model, training_set, alive)
        self._notes.append(self._noted(model, training_set, kept))
        return kept

    def batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.inner.batch(batch)

    def gradients(self, step: Step) -> tuple[Tensor, Tensor]:
        return self.inner.gradients(step)

    def state(self) -> dict[str, Tensor]:
        return self.inner.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.inner.restore(state)

    def report(self) -> dict[str, Any]:
        return self.inner.report()

    def notes_until(self, trained: Trained) -> list[Notes]:
        """The notes before every epoch, and those of the finished network."""
        kept = ~torch.isin(torch.arange(len(self._training_set)), trained.dropped.cpu())
        last = self._noted(trained.model, self._training_set, kept.to(self._training_set.device))
        return [*self._notes, last]

    def _noted(self, model: nn.Module, training_set: TrainingSet, kept: Tensor) -> Notes:
        truth = self.poison.membership(len(training_set)).to(kept.device)
        notes: Notes = {"dropped": {"poisons": _share(~kept[truth]), "clean": _share(~kept[~truth])}}
        goal = self.poison.goal
        images, places = goal.victims(self.test_set)
        logits = predict(model, images.to(training_set.device))
        if "logits" in self.quantities:
            own_labels = goal.own_labels(self.test_set, places)
            notes["achieved"] = _share(goal.achieved(logits.argmax(1).cpu(), own_labels))
            notes["logits"] = logits.mean(0).tolist()
        if "gradients" in self.quantities:
            wanted = getattr(goal, "target", None)
            if wanted is None:
                raise InputError(f'probe: "gradients" needs a wanted class; the goal {goal.kind!r} has none')
            target = torch.tensor(wanted, device=logits.device)
            pull = softmax_minus_one_hot(logits.double(), target).mean(0)
            own = softmax_minus_one_hot(predict(model, training_set.images).double(), training_set.labels)
            notes |= positions(own, training_set.labels, truth, pull)
        if "norms" in self.quantities:
            notes |= gradient_norms(model, training_set, kept)
        return notes


def positions(gradients: Tensor, labels: Tensor, truth: Tensor, pull: Tensor) -> Notes:
    """Where poisons and the clean examples of their classes lie in gradient space.

    Arguments:
        gradients: Float64[n classes].
        labels: Int64[n], as trained on.
        truth: Bool[n], the poisons.
        pull: Float64[classes], the target's adversarial gradient.

    Returns:
        Of both groups the share that is effective, and the quartiles of the distances to the mean of the
        clean examples of the class (`to_class`) and to the nearest other example of the class
        (`to_nearest`); and the median distance of `pull` from these means (`target_to_class`).
    """
    parts = []
    for label in sorted(set(labels[truth].tolist())):
        ours = labels == label
        points, poisoned = gradients[ours], truth[ours]
        if bool(poisoned.all()):
            continue  # there is no clean example to compare with
        centre = points[~poisoned].mean(0)
        to_class = (points - centre).norm(dim=1)
        nearest = [
            # The nearest of all is the example itself.
            torch.cdist(block, points, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(2, 1).values
            for block in torch.split(points, _BATCH)
        ]
        target = (pull - centre).norm().expand(len(points))
        to_target = (points - pull).norm(dim=1)
        parts.append(torch.stack([to_class, torch.cat(nearest), to_target, target, poisoned.double()]))
    to_class, nearest_other, to_target, target, poisoned = torch.cat(parts, 1)
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device=gradients.device)
    notes: Notes = {"effective": {}, "to_class": {}, "to_nearest": {}}
    for group, mask in (("poisons", poisoned == 1), ("clean", poisoned == 0)):
        notes["effective"][group] = _share((to_target < to_class)[mask])
        notes["to_class"][group] = torch.quantile(to_class[mask], quarters).tolist()
        notes["to_nearest"][group] = torch.quantile(nearest_other[mask], quarters).tolist()
    return {**notes, "target_to_class": float(target[poisoned == 1].median())}


def gradient_norms(model: nn.Module, training_set: TrainingSet, kept: Tensor) -> Notes:
    """The norm of the mean gradient of all examples, and of its difference from that of the kept ones."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums = []
    with preserved(model):
        for mask in (kept, ~kept):
            total = torch.zeros(sum(map(torch.numel, parameters)), device=training_set.device)
            for indices in torch.split(mask.nonzero().squeeze(1), _BATCH):
                if len(indices):
                    images = training_set.images.index_select(0, indices).float().div_(255)
                    labels = training_set.labels.index_select(0, indices)
                    loss = F.cross_entropy(model(images), labels, reduction="sum")
                    found = torch.autograd.grad(loss, parameters)
                    total += torch.cat([gradient.flatten() for gradient in found])
            sums.append(total)
    mean = (sums[0] + sums[1]) / len(kept)
    return {
        "gradient": float(mean.norm()),
        "difference": float((mean - sums[0] / max(int(kept.sum()), 1)).norm()),
    }


def _share(mask: Tensor) -> float:
    """The share of a mask that is set; 0 where there is nothing."""
    return float(mask.double().mean()) if len(mask) else 0.0
