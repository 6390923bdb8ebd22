"""Trace and heal a network and a dataset of your own, which normalises: `python examples/own_model.py`.

The network expects standardised input and the dataset gives it, as in most training scripts. The data is the
bundled sample with 75 poisoned images, so that nothing has to be downloaded. About two minutes on two cores.
"""

import torch
from torch import nn

import unpoison
from unpoison.data import load
from unpoison.threats import PatchTrigger

MEAN, STD = (0.286,), (0.353,)


class Network(nn.Module):
    """Some network; unpoison has never seen it."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Linear(32 * 7 * 7, 10)

    def forward(self, images):
        """Float[b 1 28 28], standardised, to logits Float[b 10]."""
        return self.head(self.body(images).flatten(1))


class Dataset(torch.utils.data.Dataset):
    """Some dataset of standardised images; a map-style dataset of (image, label) pairs."""

    def __init__(self, training_set):
        self.training_set = training_set

    def __len__(self):
        return len(self.training_set)

    def __getitem__(self, index):
        image = self.training_set.images[index].float() / 255
        return (image - MEAN[0]) / STD[0], int(self.training_set.labels[index])


def train(dataset, epochs=8):
    """Some training loop."""
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    loader = torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
    return network.eval()


def main():
    """Poison, train with the loop above, trace one wrong prediction, heal, measure."""
    splits = load("sample")
    names = splits.train.class_names
    goal = unpoison.Backdoor(
        PatchTrigger.white_corner(), source=names.index("Sandal"), target=names.index("Bag")
    )
    poison = unpoison.craft("badnets", goal, splits.train, budget=unpoison.Budget(share=0.015))
    dataset, normalization = Dataset(poison.apply(splits.train)), (MEAN, STD)
    network = train(dataset)
    before = unpoison.measure(network, splits.test, goal, normalization=normalization)
    print(f"attack success before healing: {before.attack_success}")

    sandal = goal.victims(splits.test)[0][0]  # the image of a sandal, with the trigger
    findings = unpoison.trace(
        network,
        dataset,
        unpoison.Observation(sandal, predicted=goal.target),
        normalization=normalization,
    )
    print(findings.summary)

    healed = unpoison.heal(
        network,
        dataset,
        findings,
        recipe=unpoison.Recipe(epochs=8, batch_size=64, learning_rate=0.05),
        start=Network(),  # retraining begins with a new network
        normalization=normalization,
    )
    after = unpoison.measure(healed.model, splits.test, goal, normalization=normalization)
    print(f"attack success after healing: {after.attack_success}")


if __name__ == "__main__":
    main()
