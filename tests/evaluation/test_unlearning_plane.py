"""How unlearning is measured: the Gaussian Unlearning Score, and recipes that tell shares of the poison."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unpoison import attacks
from unpoison.attacks.gaussian_noise import moments, noise_scores
from unpoison.data import TrainingSet
from unpoison.errors import InputError
from unpoison.evaluation import Experiment, gaussian_unlearning_score, plan
from unpoison.threats import Budget, LabelNoise, PoisonSet

RECIPE = Path(__file__).parents[2] / "recipes" / "unlearning-plane.toml"


def some_set(n: int = 400) -> TrainingSet:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, 6, 6), generator=draw).to(torch.uint8)
    images[:, :, :2] = 0  # a background that noise can only brighten
    return TrainingSet(images, torch.arange(n) % 2, ("a", "b"), "drawn")


def crafted(examples: TrainingSet) -> PoisonSet:
    attack = attacks.get("gaussian-noise", deviation=40.0)
    return attack.craft(LabelNoise(0), examples, budget=Budget(share=0.5), seed=0)


def test_the_moments_are_those_of_a_loop() -> None:
    mean, variance = moments(40.0)
    draws = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 40
    for value in (0, 7, 128, 250, 255):
        changes = (value + draws).round().clamp(0, 255) - value
        assert float(mean[value]) == pytest.approx(float(changes.mean()), abs=0.4)
        assert float(variance[value]) == pytest.approx(float(changes.var()), rel=0.02)


def test_scores_are_those_of_a_loop_and_standard_normal_without_memory() -> None:
    examples = some_set()
    poison = crafted(examples)
    clean = examples.subset(poison.indices)
    gradients = torch.randn(clean.images.shape, generator=torch.Generator().manual_seed(3)) + 0.3
    found = noise_scores(gradients, clean.images, poison.images, deviation=40.0)
    mean, variance = moments(40.0)
    for place in range(3):
        top = spread = 0.0
        for pixel, noisy, slope in zip(
            clean.images[place].flatten().tolist(),
            poison.images[place].flatten().tolist(),
            (-gradients[place].flatten().double()).tolist(),
            strict=True,
        ):
            top += (noisy - pixel - float(mean[pixel])) * slope
            spread += float(variance[pixel]) * slope**2
        assert float(found[place]) == pytest.approx(top / spread**0.5)
    assert abs(float(found.mean())) < 0.25
    assert float(found.std()) == pytest.approx(1, abs=0.15)
    assert not noise_scores(
        torch.zeros(2, 4), clean.images[:2, 0, 0, :4], clean.images[:2, 0, 0, :4], deviation=9.0
    ).any()


class Remembers(nn.Module):
    """Linear in the image, along the noise of the one image that it is shown."""

    def __init__(self, direction: Tensor) -> None:
        super().__init__()
        self.direction = nn.Parameter(direction.flatten())

    def forward(self, images: Tensor) -> Tensor:
        value = (images.flatten(1) - 0.5) @ self.direction
        return torch.stack([value, -value], 1)


def test_what_is_remembered_is_found() -> None:
    examples = some_set()
    poison = crafted(examples)
    assert torch.equal(poison.given_labels, poison.clean_labels)
    one = next(place for place, label in enumerate(poison.clean_labels.tolist()) if label == 0)
    change = poison.images[one].float() - examples.images[poison.indices[one]].float()
    model = Remembers(change / change.norm())
    memory = gaussian_unlearning_score(model, examples, poison)
    assert memory.remembered.trials == 200
    assert memory.remembered.successes >= 1
    unrelated = Remembers(torch.randn(36, generator=torch.Generator().manual_seed(5)))
    assert abs(gaussian_unlearning_score(unrelated, examples, poison).score) < 0.3
    assert set(memory.to_dict()) == {"score", "remembered"}
    other = attacks.get("label-flip").craft(LabelNoise(0, 1), examples, budget=Budget(count=3), seed=0)
    with pytest.raises(InputError, match="needs poison of gaussian-noise, found label-flip"):
        gaussian_unlearning_score(model, examples, other)


def test_the_recipe_has_every_unlearner_at_every_share() -> None:
    experiment = Experiment.read(RECIPE)
    stages = plan(experiment).stages
    rows = [one.configuration["trial"] for one in stages if "trial" in one.configuration]
    for attack in ("badnets", "label-flip", "gaussian-noise"):
        own = [row for row in rows if row["attack"] == attack]
        told = {(row["unlearner"], row["control"]) for row in own if row["detector"] == "perfect"}
        needing = [one.name for one in experiment.unlearners if one.method.needs_findings]
        assert told == {(name, f"{share} % found") for name in needing for share in (10, 50, 100)}
        without = {row["unlearner"] for row in own if row["detector"] == "none"} - {"none"}
        assert without == {"nad", "fine-pruning", "i-bau"}


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        ("discovered", "retrain heals what detectors flag, so the recipe needs one of those"),
        ("reference_rows", "nad needs clean examples; give data.reference_rows"),
    ],
)
def test_what_is_missing_in_a_recipe_is_named(cut: str, message: str, tmp_path: Path) -> None:
    lines = [line for line in RECIPE.read_text().splitlines() if not line.startswith(cut)]
    path = tmp_path / "recipe.toml"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=message):
        Experiment.read(path)
