"""MetaPoison beside the public port's formulation.

    python -m benchmarks.metapoison [--json]

One epoch of a surrogate: ConvNetBN, 5,000 images of CIFAR's shape in 40 batches, 50 poisons, K = 2, the
paper's quick start with one of its 24 surrogates. Each way gives every poison one gradient and takes the 40
ordinary steps:

- ours, spread: MetaPoison as published, each poison in the random batch where it falls;
- ours, concentrated: 12 poisons in each of a few batches, which is another algorithm: fewer look-aheads;
- the port: a functional copy of the network whose every forward and backward pass keeps its graph, one batch
  after another, in PyTorch's default layout, and an ordinary step by `torch.optim.SGD`. Written anew here.
  The port leaves the target out of the batch; here it is in it, so that the work is the same;
- the ordinary steps alone, for scale;
- agreement: the gradients of both formulations on one batch.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from benchmarks._harness import Bench, main, random_images
from unpoison.attacks import MetaPoison
from unpoison.attacks.metapoison.look_ahead import look_ahead
from unpoison.attacks.metapoison.surrogates import Epoch, SurrogateConfiguration, SurrogateStack
from unpoison.data import TrainingSet
from unpoison.models import build
from unpoison.threats import Budget, LInf, TargetedMisclassification

UNROLL, CONCENTRATED = 2, 12
EQUAL, OTHER, PLAIN = "an epoch, spread", "an epoch, concentrated", "the ordinary steps alone"


class Port:
    """The same craft step, formulated as the public port does it."""

    def __init__(
        self, clean: TrainingSet, poisons: Tensor, delta: Tensor, target: Tensor, rate: float
    ) -> None:
        self.clean, self.poisons, self.delta, self.target, self.rate = clean, poisons, delta, target, rate
        self.net = build("convnet-bn", num_classes=10, seed=0, normalization=clean.channel_statistics).train()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=rate)
        self.gradient = torch.zeros_like(delta)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Float images and labels."""
        return self.clean.images[rows].float() / 255, self.clean.labels[rows]

    def look(self, rows: list[Tensor]) -> Tensor:
        """The gradient of the target's loss after K steps in all poisons, by one graph through everything."""
        delta = self.delta.clone().requires_grad_()
        buffers = {name: value.clone() for name, value in self.net.named_buffers()}
        parameters = {
            name: value.detach().clone().requires_grad_() for name, value in self.net.named_parameters()
        }
        losses = []
        for depth, chosen in enumerate(rows):
            images, labels = self.batch(chosen)
            if depth == 0:
                hits, members = (chosen[:, None] == self.poisons[None]).nonzero(as_tuple=True)
                images = images.index_add(0, hits, delta[members])
            inputs = torch.cat([images, self.target])
            outputs = functional_call(self.net, {**parameters, **buffers}, (inputs,))
            if depth:
                logits = outputs[len(chosen) :]
                rivals = logits.clone()
                rivals[:, 1] = -torch.inf
                losses.append((rivals.amax(1) - logits[:, 1]).mean())
            if depth < UNROLL:
                loss = F.cross_entropy(outputs[: len(chosen)], labels)
                gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
                parameters = {
                    name: value - self.rate * gradient
                    for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
                }
        (gradient,) = torch.autograd.grad(torch.stack(losses).mean(), delta)
        return gradient

    def epoch(self, rows: list[Tensor]) -> int:
        """Look ahead wherever a poison falls, take the ordinary steps, and count the look-aheads."""
        looks = 0
        for number, chosen in enumerate(rows):
            if bool(torch.isin(chosen, self.poisons).any()):
                self.gradient += self.look(following(rows, number))
                looks += 1
            images, labels = self.batch(chosen)
            loss = F.cross_entropy(self.net(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return looks


def following(rows: list[Tensor], number: int) -> list[Tensor]:
    """A batch and those after it."""
    return [rows[(number + step) % len(rows)] for step in range(UNROLL + 1)]


def agreement(
    attack: MetaPoison, goal: TargetedMisclassification, surrogates: SurrogateStack, epoch: Epoch, port: Port
) -> float:
    """The relative difference of the two gradients on one batch, from the same weights."""
    rows = [part[0] for part in epoch.rows]
    number = next(place for place, one in enumerate(rows) if bool(torch.isin(one, port.poisons).any()))
    chosen = following(rows, number)
    places, members = (chosen[0][:, None] == port.poisons[None]).nonzero(as_tuple=True)
    pixels = (port.batch(port.poisons[members])[0] + port.delta[members]).requires_grad_()
    first = epoch.examples(chosen[0][None], (places, pixels), epoch.draws("none"))
    later = [epoch.examples(part[None], None, epoch.draws("none")) for part in chosen[1:]]
    found = look_ahead(
        surrogates.network,
        surrogates.parameters,
        surrogates.buffers,
        surrogates.momenta,
        [first, *later],
        port.target,
        lambda logits: attack.loss(goal, logits),
        epoch.sgd(0),
    )
    (own,) = torch.autograd.grad(found.loss.sum(), pixels)
    state = surrogates.parameters | surrogates.buffers
    port.net.load_state_dict({name: value[0] for name, value in state.items()})
    theirs = port.look(chosen)[members]
    return float((own - theirs).abs().max() / theirs.abs().max())


def measure(bench: Bench) -> None:
    """Agreement, then the three ways."""
    share = 10 if bench.options.quick else 1
    count, generator = 50 // share, torch.Generator().manual_seed(0)
    clean = random_images(5000 // share, generator)
    goal = TargetedMisclassification(random_images(1, generator).images, 0, 1)
    attack = MetaPoison(
        surrogates=1,
        steps=1,
        unroll=UNROLL,
        lifetime=20,
        poisons_per_batch=0,
        selection="first",
        perturbation=LInf(8),
    )
    configuration = SurrogateConfiguration(
        training_set=clean, templates=(), recipe=attack.recipe, lifetime=20, pretrained=False, seed=0
    )

    def ordinary() -> None:
        SurrogateStack(configuration, [0]).train_epoch()

    def craft(poisons_per_batch: int) -> None:
        # One step with one surrogate, whose pretraining takes no epoch: it begins at epoch 0.
        dataclasses.replace(attack, poisons_per_batch=poisons_per_batch).craft(
            goal, clean, budget=Budget(count=count), seed=0
        )

    surrogates = SurrogateStack(configuration, [0])
    epoch = Epoch(surrogates)
    rows = [part[0] for part in epoch.rows]
    poisons = (clean.labels == 1).nonzero().squeeze(1)[:count]
    delta = torch.randn(count, 3, 32, 32, generator=generator) * 0.02
    port = Port(clean, poisons, delta, goal.images.float() / 255, float(epoch.sgd(0).rates[0]))
    error = agreement(attack, goal, surrogates, epoch, port)
    bench.agreement = {"relative error of the gradient on one batch": error}
    found = bench.compare(EQUAL, {"unpoison": lambda: craft(0), "port": lambda: port.epoch(rows)})
    looks = {"spread, and of the port": found["port"], "concentrated": -(-count // CONCENTRATED)}
    bench.compare(
        OTHER,
        {"unpoison": lambda: craft(CONCENTRATED), "port": lambda: port.epoch(rows)},
        differs=f"{looks['concentrated']} look-aheads in place of {found['port']}",
        warm=True,
    )
    bench.compare(PLAIN, {"unpoison": ordinary})
    bench.work = {
        "model": "convnet-bn",
        "images": len(clean),
        "batches": len(rows),
        "poisons": count,
        "unroll": UNROLL,
        **{f"look-aheads, {way}": number for way, number in looks.items()},
    }


if __name__ == "__main__":
    main(measure, threads=1)
