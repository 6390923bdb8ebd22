"""The scores of the test-time detectors against plain loops, and what they say of a planted trigger."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unpoison import input_detectors
from unpoison.data import DatasetExamples, TensorExamples, TrainingSet
from unpoison.errors import InputError
from unpoison.input_detectors.ibd_psc import amplified, norm_layers
from unpoison.input_detectors.scale_up import by_answer


class Cornered(nn.Module):
    """Answers 0 for a white corner, whatever else is in the image; else by the brighter half."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, images: Tensor) -> Tensor:
        left, right = images[..., :3].mean((1, 2, 3)), images[..., 3:].mean((1, 2, 3))
        corner = (images[:, 0, -2:, -2:].amin((1, 2)) > 0.99).to(images.dtype)
        return (
            torch.stack([100 * corner, 20 * (left - right), 20 * (right - left)], 1)
            + 0 * self.norm(images).mean((1, 2, 3))[:, None]
        )


def images(count: int, seed: int) -> TrainingSet:
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(10, 120, (count, 1, 6, 6), dtype=torch.uint8, generator=draw)
    labels = torch.arange(count) % 2 + 1
    pixels[labels == 1, ..., :3] += 60
    pixels[labels == 2, ..., 3:] += 60
    return TrainingSet(pixels, labels, ("corner", "left", "right"), "halves")


@pytest.mark.parametrize("method", ["strip", "scale-up"])
def test_a_planted_trigger_is_found(method: str) -> None:
    inputs = images(20, 5)
    stamped = inputs.images.clone()
    stamped[:10, :, -2:, -2:] = 255
    found = input_detectors.get(method).screen(
        Cornered().eval(),
        TrainingSet(stamped, inputs.labels, inputs.class_names),
        reference=images(300, 1),
        false_positive_rate=0.05,
    )
    if method == "strip":
        assert set(range(10)) <= set(found.flagged.tolist())
        assert set(found.suspects().tolist()) == set(range(10))
    assert bool(found.scores[:10].mean() >= found.scores[10:].mean())
    assert found.answers[:10].tolist() == [0] * 10


def test_the_entropy_of_strip_is_that_of_a_plain_loop() -> None:
    model, inputs, reference = Cornered().eval(), images(3, 5), images(60, 1)
    detector: Any = input_detectors.get("strip", overlays=4)
    found = detector.screen(model, inputs, reference=reference, false_positive_rate=0.1, seed=2)
    from unpoison._seeds import generator

    order = torch.randperm(60, generator=generator(2, "screen", "reference"))
    for index in range(3):
        total = 0.0
        for one in order[:4].tolist():
            mixed = (inputs.images[index].float() / 255 + reference.images[one].float() / 255).clamp(max=1)
            chances = model(mixed[None]).detach().double().softmax(1)[0].tolist()
            total -= sum(chance * math.log2(chance) for chance in chances if chance > 0)
        assert float(found.scores[index]) == pytest.approx(-total / 4, abs=1e-5)


def test_the_consistency_of_scale_up_is_that_of_a_plain_loop() -> None:
    model, inputs = Cornered().eval(), images(12, 5)
    found = input_detectors.get("scale-up").screen(model, inputs, reference=images(60, 1))
    for index in range(12):
        image = inputs.images[index].float() / 255
        own = int(model(image[None]).argmax())
        same = [int(model((n * image).clamp(0, 1)[None]).argmax()) == own for n in (3, 5, 7, 9, 11)]
        assert float(found.scores[index]) == pytest.approx(sum(same) / 5)


def test_the_data_limited_consistency_is_in_units_of_its_class() -> None:
    values, answers = torch.tensor([0.0, 1.0, 0.5, 0.5, 9.0]), torch.tensor([0, 0, 2, 2, 2])
    means, deviations = by_answer(values, answers, 2)
    assert means.tolist() == pytest.approx([0.5, 2.2, 0.5, 2.2])
    assert deviations.tolist()[0] == pytest.approx(0.6)


class Two(nn.Module):
    """Two norm layers, of which the first is called last."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        with torch.no_grad():
            for place, norm in enumerate((self.first, self.last)):
                norm.weight.copy_(torch.tensor([0.5, 1.0, 1.5]) + place)
                norm.bias.copy_(torch.tensor([-0.2, 0.1, 0.4]))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.last(self.first(inputs).relu())
        return hidden


def test_amplifying_a_layer_is_multiplying_its_parameters() -> None:
    model, inputs = Two().eval(), torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    layers = norm_layers(model, inputs[:1], torch.device("cpu"))
    assert layers == [model.first, model.last]
    for count in (1, 2):
        other = Two().eval()
        with torch.no_grad():
            for norm in (other.first, other.last)[-count:]:
                norm.weight *= 1.5
                norm.bias *= 1.5
        with amplified(layers[-count:], 1.5):
            torch.testing.assert_close(model(inputs), other(inputs))
    torch.testing.assert_close(model(inputs), Two().eval()(inputs))


def test_the_consistency_of_ibd_psc_is_that_of_a_plain_loop() -> None:
    model = Two().eval()
    draw = torch.Generator().manual_seed(1)
    inputs = TensorExamples(torch.randn(5, 3, generator=draw), torch.zeros(5, dtype=torch.int64))
    reference = TensorExamples(torch.randn(40, 3, generator=draw), torch.arange(40) % 3)
    detector = input_detectors.get("ibd-psc", error_rate=0.0)  # so that one layer is amplified enough
    found = detector.screen(model, inputs, reference=reference)
    rows: Tensor = inputs.tensors[0]
    own = model(rows).argmax(1)
    chances = []
    for count in (1, 2):
        other = Two().eval()
        with torch.no_grad():
            for norm in (other.first, other.last)[-count:]:
                norm.weight *= 1.5
                norm.bias *= 1.5
        chances.append(other(rows).softmax(1).gather(1, own[:, None])[:, 0])
    expected = torch.stack(chances).mean(0)
    torch.testing.assert_close(found.scores, expected.double(), rtol=1e-5, atol=1e-6)


def test_a_network_without_norm_layers_is_refused() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).eval()
    with pytest.raises(InputError, match="norm layers"):
        input_detectors.get("ibd-psc").screen(plain, images(5, 5), reference=images(60, 1))


def test_options_out_of_range_are_refused() -> None:
    for options in ({"factors": []}, {"factors": [0.0]}, {"per_class": -1}):
        with pytest.raises(InputError):
            input_detectors.get("scale-up", **options)


def test_a_reference_that_is_read_in_batches_is_not_counted_as_held() -> None:
    from unpoison._memory import limited

    detector = input_detectors.get("scale-up", preset="data-limited", batch_size=8)
    reference = images(4000, 1)
    with limited(200_000):  # as floats, half of the reference takes 288,000
        found = detector.screen(Cornered().eval(), images(5, 5), reference=reference)
    assert found.calibrated_on == 2000


def test_ibd_psc_reads_what_it_learns_from_once() -> None:
    read: list[int] = []

    class Counted:
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            read.append(index)
            return torch.full((3,), float(index)), index % 3

    reference = DatasetExamples(Counted(), memory_bytes=0, class_names=("a", "b", "c"))
    inputs = TensorExamples(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64))
    read.clear()
    # No error rate is above 1, so that all layers are tried.
    input_detectors.get("ibd-psc", error_rate=1.0).screen(Two().eval(), inputs, reference=reference)
    assert len(read) <= 40 + 3  # and a few to see what the inputs are like
