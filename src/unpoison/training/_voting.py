"""Votes of networks that were trained on parts of a training set, and what is certain about them.

Levine and Feizi 2021, "Deep Partition Aggregation" (ICLR, arXiv 2006.14768), and Wang, Levine and Feizi 2022,
"Improved Certified Defenses against Data Poisoning with (Deterministic) Finite Aggregation" (ICML, arXiv
2202.02628). A hash of each image says to which part its example belongs; each network learns from one part,
or from several. An example that is inserted, removed or labelled otherwise changes one part, and so only the
networks that learn from it; a changed image is one that is removed and one that is inserted. For every
prediction there is a number of such changes that cannot alter it.

The certificate holds because what a network learns depends on its parts alone: images are hashed without
their labels, the examples of a part are sorted by content, and the seed of a network is that of its number.
Network and recipe must be fixed before the training set is seen. On other machines or versions of torch the
certificate holds for the training as it is done there.

Networks are trained one after another, or `workers` at a time, in processes of one thread each. These are the
networks that one thread trains one after another, bit for bit; several threads add in another order.

Cost: a training on the whole set for each time that an example is used. Memory: a training for each worker,
and all networks.
"""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, Self, final

import torch
from torch import Tensor, nn

from unpoison._executors import LocalExecutor, shared
from unpoison._inputs import placed
from unpoison._progress import Progress
from unpoison._seeds import derive_seed
from unpoison._statistics import Proportion
from unpoison.data import Examples, TrainingSet
from unpoison.errors import InputError, TrainingDivergedError
from unpoison.models import device_of, preserved, usual_mode
from unpoison.training._epoch_record import EpochRecord
from unpoison.training._recipe import Recipe
from unpoison.training._trained import Trained
from unpoison.training._voting_network import Voting

LEAST: Final = 2
"""Examples that a network needs to vote; batch norm cannot train on one."""


@final
@dataclass(frozen=True, eq=False)
class Partition:
    """Which network learns from which examples.

    Arguments:
        parts: Int64[n], the part of each example.
        order: Int64[n], the examples sorted by content: in this order a network is given them.
        uses: Int64[k d], the parts that each network learns from.
        workers: how many networks are trained at a time, 1 or more.
    """

    parts: Tensor
    order: Tensor
    uses: Tensor
    workers: int = 1

    @classmethod
    def by_content(cls, training_set: TrainingSet, uses: Tensor, *, workers: int = 1) -> Self:
        """The partition by a hash of each image, its label left aside.

        Arguments:
            training_set: read once.
            uses: Int64[k d], of parts 0, 1, ... up to the greatest that is named.
            workers: how many networks are trained at a time, 1 or more.
        """
        count = int(uses.max()) + 1
        images = training_set.images.cpu().flatten(1).contiguous().numpy()
        hashes = [hashlib.sha256(image.tobytes()).digest() for image in images]
        labels = training_set.labels.tolist()
        order = sorted(range(len(hashes)), key=lambda index: (hashes[index], labels[index]))
        parts = [int.from_bytes(one[:8], "big") % count for one in hashes]
        numbers = torch.tensor([parts, order], dtype=torch.int64)
        return cls(numbers[0], numbers[1], uses, workers)

    def examples_of(self, network: int) -> Tensor:
        """Int64[m]: what a network learns from, in its order."""
        used = torch.isin(self.parts, self.uses[network])
        return self.order[used[self.order]]


def train_votes(
    train: Callable[..., Trained],
    training_set: TrainingSet,
    recipe: Recipe,
    partition: Partition,
    *,
    seed: int,
    included: Tensor,
    start: nn.Module | None,
    device: torch.device,
    checkpoints: str | os.PathLike[str] | None,
    progress: Progress | None,
) -> Trained:
    """Train the networks of a partition, one after another or several at a time.

    A network with fewer than two examples, or whose training diverges, votes for no class.

    Arguments:
        train: trains one of them.
        training_set: the whole set.
        recipe: of each network.
        partition: of this set.
        seed: of all.
        included: Bool[n], the examples the run may learn from.
        start: the network to begin each with a copy of.
        device: where to train.
        checkpoints: a directory, with one for each network.
        progress: told of every epoch of every network; of networks that are trained at a time, of each at its
            end.

    Returns:
        The vote; its seconds are those of all networks together.

    Raises:
        InputError: there are too few examples for any network, or one could not be trained.
    """
    work = _Work(train, training_set, recipe, partition, seed, included.cpu(), start, device, checkpoints)
    count = len(partition.uses)
    if min(partition.workers, count) > 1:
        trained = _side_by_side(work, progress)
    else:
        told = (None if progress is None else partial(_told, progress, one, count) for one in range(count))
        made = {number: work.network(number, one) for number, one in enumerate(told)}
        trained = {number: one for number, one in made.items() if one is not None}
    if not trained:
        raise InputError(
            f"{training_set.name}: no part of {count} has {LEAST} examples to train on; take fewer partitions"
        )
    first = next(iter(trained.values()))
    networks = [
        trained[number].model if number in trained else copy.deepcopy(first.model) for number in range(count)
    ]
    voters = torch.tensor([number in trained for number in range(count)])
    model = Voting(networks, partition.uses, voters)
    return replace(
        first,
        model=model.to(device).eval(),
        seed=seed,
        training_fingerprint=training_set.fingerprint,
        history=_together([one.history for one in trained.values()]),
        seconds=sum(one.seconds for one in trained.values()),
    )


@final
@dataclass(frozen=True, eq=False)
class _Work:
    """What every network of a partition is trained with; see `train_votes`."""

    train: Callable[..., Trained]
    training_set: TrainingSet
    recipe: Recipe
    partition: Partition
    seed: int
    included: Tensor
    start: nn.Module | None
    device: torch.device
    checkpoints: str | os.PathLike[str] | None

    def network(self, number: int, progress: Progress | None) -> Trained | None:
        """One of them; None where it has too few examples, or diverges."""
        chosen = self.partition.examples_of(number)
        chosen = chosen[self.included[chosen]]
        if len(chosen) < LEAST:
            return None
        own = None if self.checkpoints is None else Path(self.checkpoints) / f"network-{number:04d}"
        try:
            return self.train(
                self.training_set.subset(chosen.to(self.training_set.device)),
                self.recipe,
                seed=derive_seed(self.seed, "vote", number),
                start=self.start,
                device=self.device,
                checkpoints=own,
                progress=progress,
            )
        except TrainingDivergedError:
            return None


def _side_by_side(work: _Work, progress: Progress | None) -> dict[int, Trained]:
    """The networks, by processes, which leave them in files."""
    count = len(work.partition.uses)
    forks = work.device.type == "cpu" and "fork" in multiprocessing.get_all_start_methods()
    # Workers begin without a GPU's memory; each takes its part to the device.
    start = None if work.start is None else copy.deepcopy(work.start).to("cpu")
    work = replace(work, training_set=work.training_set.to("cpu"), start=start)
    waiting, running, trained = list(range(count))[::-1], 0, dict[int, Trained]()
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalExecutor(min(work.partition.workers, count), start="fork" if forks else "spawn") as executor,
    ):
        executor.share((work, folder))
        while waiting or running:
            # No more at a time than there are workers: what waits loses no attempt when one of them dies.
            while waiting and running < executor.workers:
                number, running = waiting.pop(), running + 1
                executor.submit(str(number), _train_apart, number)
            for done in executor.wait():
                running -= 1
                if done.error is not None:
                    raise InputError(f"{work.training_set.name}: network {done.key}: {done.error}")
                if done.value:
                    own = copy.deepcopy(work.start)
                    stored = Trained.load(Path(folder) / done.key, model=own, device=work.device)
                    trained[int(done.key)] = stored
                if progress is not None:
                    epochs = work.recipe.epochs
                    progress("training", (count - len(waiting) - running) * epochs, count * epochs)
    return dict(sorted(trained.items()))


def _train_apart(number: int) -> bool:
    """In a worker: train a network and store it; whether it votes."""
    work, folder = shared()
    found = work.network(number, None)
    if found is not None:
        found.save(Path(folder) / str(number))
    return found is not None


def _told(
    progress: Progress, number: int, count: int, stage: str, done: int, total: int, /, **metrics: float
) -> None:
    progress(stage, number * total + done, count * total, **metrics)


def _together(histories: Sequence[tuple[EpochRecord, ...]]) -> tuple[EpochRecord, ...]:
    """The epochs of all networks: means over their examples, and sums."""
    records = []
    for epochs in zip(*histories, strict=True):
        examples = sum(one.examples for one in epochs)
        mean = {
            name: sum(getattr(one, name) * one.examples for one in epochs) / examples
            for name in ("loss", "accuracy")
        }
        seconds = sum(one.seconds for one in epochs)
        records.append(replace(epochs[-1], examples=examples, seconds=seconds, **mean))
    return tuple(records)


@final
@dataclass(frozen=True, eq=False)
class Certificates:
    """The predictions of a vote, and how many changed examples none of them depends on.

    Arguments:
        predicted: Int64[n].
        radius: Int64[n]: so many training examples may be inserted, removed or labelled otherwise, in any
            way, and the prediction stays as it is.
    """

    predicted: Tensor
    radius: Tensor

    def curve(self, labels: Tensor) -> tuple[Proportion, ...]:
        """Certified accuracy: how many predictions are right, and stay so under 0, 1, 2, ... changes."""
        radii = self.radius[self.predicted == labels.cpu()]
        most = int(radii.max()) if len(radii) else 0
        return tuple(Proportion(int((radii >= number).sum()), len(labels)) for number in range(most + 1))


def certify(model: Trained | nn.Module, examples: Examples, *, batch_size: int = 256) -> Certificates:
    """The predictions of a vote, each with its certificate.

    Arguments:
        model: trained under a defense that certifies ("dpa", "finite-aggregation").
        examples: what to predict.
        batch_size: examples a pass.

    Raises:
        InputError: the model is no vote.
    """
    network = model.model if isinstance(model, Trained) else model
    if not isinstance(network, Voting):
        raise InputError("certify: the model is no vote of networks; train under dpa or finite-aggregation")
    device, found = device_of(network), []
    with usual_mode(device), preserved(network), torch.no_grad():
        for inputs, *_ in examples.in_batches(batch_size):
            votes = network.votes(placed(inputs, device)).cpu()
            found.append(certified(votes, network.uses.cpu(), classes=examples.num_classes))
    empty = torch.empty(0, dtype=torch.int64)
    return Certificates(
        torch.cat([empty, *(one.predicted for one in found)]),
        torch.cat([empty, *(one.radius for one in found)]),
    )


def certified(votes: Tensor, uses: Tensor, *, classes: int) -> Certificates:
    """The winner of each vote, and its radius.

    Of the winner c and any other class, each network that uses a changed part may take one vote from c and
    give one to the other: the margin falls by 2 where the network voted for c, by 0 where it voted for the
    other, else by 1. So many parts may be changed as, taken from the most harmful on, leave the margin.

    Arguments:
        votes: Int64[n k], classes, or -1 for none.
        uses: Int64[k d], the parts that each network learns from.
        classes: how many there are.
    """
    counts = torch.stack([(votes == label).sum(1) for label in range(classes)], 1)
    # The first greatest: a tie goes to the lower class.
    winner = (counts == counts.amax(1, keepdim=True)).to(torch.int8).argmax(1)
    networks_of = torch.zeros(int(uses.max()) + 1, len(uses), dtype=torch.float64)
    networks_of[uses.flatten(), torch.arange(len(uses)).repeat_interleave(uses.shape[1])] = 1
    radius = torch.full((len(votes),), len(networks_of), dtype=torch.int64)
    own = counts.gather(1, winner[:, None])[:, 0]
    for_winner = (votes == winner[:, None]).double()
    for label in range(classes):
        gap = own - counts[:, label] - (label < winner).long()
        harm = (1 + for_winner - (votes == label).double()) @ networks_of.T
        worst = harm.sort(1, descending=True).values.cumsum(1)
        most = (worst <= gap[:, None]).sum(1)
        radius = torch.where(winner == label, radius, torch.minimum(radius, most))
    return Certificates(winner, radius)
