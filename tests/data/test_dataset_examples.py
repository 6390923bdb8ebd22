"""Any map-style dataset as examples: what is read, checked and said."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset

import unpoison
from unpoison.data import DatasetExamples, TensorExamples, TrainingSet, as_examples, as_training_set
from unpoison.errors import InputError

NAMES = ("cat", "dog", "fox")


class Rows:
    """A dataset of a function of the index, which counts how often it is read."""

    def __init__(self, row: Callable[[int], Any], count: int = 30, **attributes: Any) -> None:
        self.row, self.count, self.read = row, count, 0
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.count:
            raise IndexError(index)
        self.read += 1
        return self.row(index)


def pixels(count: int = 30, channels: int = 3, size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 200, (count, channels, size, size), generator=generator)
    return (noise + 25 * (torch.arange(count) % 3)[:, None, None, None]).to(torch.uint8)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU())
        return nn.Sequential(body, nn.Linear(8, 3)).eval()


IMAGES, LABELS = pixels(), torch.arange(30) % 3
HELD = TrainingSet(IMAGES, LABELS, NAMES)


def large(**options: Any) -> DatasetExamples:
    """The same images, never kept in memory."""
    dataset = Rows(lambda index: (IMAGES[index], int(LABELS[index])), classes=NAMES)
    return DatasetExamples(dataset, memory_bytes=0, **options)


@given(order=st.permutations(range(30)), cut=st.integers(1, 30), size=st.integers(1, 11))
@settings(deadline=None, max_examples=25)
def test_every_way_of_reading_gives_the_same(order: list[int], cut: int, size: int) -> None:
    for examples in (large(), DatasetExamples(TensorDataset(IMAGES, LABELS), class_names=NAMES)):
        chosen = torch.tensor(order[:cut])
        for found, right in zip(examples.at(chosen), HELD.at(chosen), strict=True):
            assert torch.equal(found, right)
        part, held = examples.subset(chosen), HELD.subset(chosen)
        assert torch.equal(part.labels, held.labels)
        for found, right in zip(part.in_batches(size), held.in_batches(size), strict=True):
            assert torch.equal(found[0], right[0])
            assert torch.equal(found[1], right[1])
        backwards = torch.arange(cut).flip(0)
        joined = torch.cat([inputs for inputs, _ in part.in_batches(size, backwards)])
        assert torch.equal(joined, held.at(backwards)[0])


def test_no_rows_have_the_shape_of_rows() -> None:
    examples = large()
    for inputs, labels in (examples.at([]), *examples.in_batches(4, torch.zeros(0, dtype=torch.int64))):
        assert tuple(inputs.shape) == (0, *HELD.batch(0, 1)[0].shape[1:])
        assert tuple(labels.shape) == (0,)


def test_workers_read_ahead_in_order() -> None:
    examples = large(workers=2)
    for start in (0, 7, 14, 21, 28, 0, 7):
        inputs, labels = examples.batch(start, start + 7)
        assert torch.equal(inputs, HELD.batch(start, start + 7)[0])
        assert torch.equal(labels, HELD.labels[start : start + 7])
    read = torch.cat([inputs for inputs, _ in examples.in_batches(4)])
    assert torch.equal(read, HELD.batch(0, 30)[0])


@pytest.mark.parametrize("method", ["activation-clustering", "spectral-signatures", "spectre", "deep-knn"])
def test_scans_give_the_same_bits_as_in_memory(method: str) -> None:
    held, read = (unpoison.scan(network(), one, method=method) for one in (HELD, large()))
    assert torch.equal(held.scores, read.scores)
    assert torch.equal(held.flagged, read.flagged)


@pytest.mark.parametrize("method", ["ek-fac", "trak", "delta-influence"])
def test_traces_give_the_same_bits_as_in_memory(method: str) -> None:
    observation = unpoison.Observation(IMAGES[3].flip(-1))
    held, read = (unpoison.trace(network(), one, observation, method=method) for one in (HELD, large()))
    if method == "delta-influence":  # z-scores by statistics that are summed up in another order
        assert torch.allclose(held.scores, read.scores, rtol=1e-3)
    else:
        assert torch.equal(held.scores, read.scores)


def test_the_calibrated_detector_reads_any_images() -> None:
    detector = unpoison.detectors.get("calibrated", false_alarm_level=0.1)
    observation = unpoison.Observation(IMAGES[3].flip(-1))
    held, read = (unpoison.trace(network(), one, observation, method=detector) for one in (HELD, large()))
    assert read.p_value == pytest.approx(held.p_value)
    assert torch.allclose(held.scores, read.scores, rtol=1e-3, atol=1e-4)


def test_a_set_that_fits_is_read_once_and_kept() -> None:
    dataset = Rows(lambda index: (torch.full((4,), float(index)), index % 2), 200)
    examples = DatasetExamples(dataset)
    read = dataset.read
    assert read <= 200 + 3 * 64
    assert examples.batch(3, 5)[0][:, 0].tolist() == [3.0, 4.0]
    list(examples.in_batches(16))
    assert dataset.read == read


def test_labels_that_the_dataset_has_are_not_read_row_by_row() -> None:
    dataset = Rows(lambda index: (torch.zeros(4), index % 2), 5000, targets=[row % 2 for row in range(5000)])
    examples = DatasetExamples(dataset, memory_bytes=0)
    assert dataset.read < 300
    assert examples.labels.tolist() == [row % 2 for row in range(5000)]
    # Labels that rows do not have are not believed.
    other = Rows(
        lambda index: (torch.zeros(4), (index + 1) % 2), 200, targets=[row % 2 for row in range(200)]
    )
    assert DatasetExamples(other, memory_bytes=0).labels.tolist() == [(row + 1) % 2 for row in range(200)]


@pytest.mark.parametrize("where", [0, 137, 999])
def test_random_transforms_are_found_wherever_they_are(where: int) -> None:
    def row(index: int) -> Any:
        return torch.rand(4) if index >= where else torch.zeros(4), index % 2

    with pytest.raises(InputError, match="changes when it is read again") as error:
        DatasetExamples(Rows(row, 1000), memory_bytes=0)
    assert "\n" not in str(error.value)


def test_one_row_that_changes_is_found_by_the_second_pass() -> None:
    dataset = Rows(lambda index: (torch.rand(4) if index == 501 else torch.zeros(4), index % 2), 1000)
    examples = DatasetExamples(dataset, memory_bytes=0)
    with pytest.raises(InputError, match="row 501: the input changes"):
        list(examples.in_batches(64))  # after labels were collected


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_row_is_one_line_that_names_it(workers: int) -> None:
    def row(index: int) -> Any:
        if index == 333:
            raise FileNotFoundError("photos/333.png\nis gone")
        return torch.zeros(4), index % 2

    with pytest.raises(InputError, match=r"row 333: cannot be read .*photos/333\.png is gone") as error:
        DatasetExamples(Rows(row, 1000), workers=workers)
    assert "\n" not in str(error.value)


def test_classes_and_names_come_through_subsets_and_joins() -> None:
    first = Rows(lambda index: (IMAGES[index], NAMES[index % 3]), 20, classes=NAMES)
    joined = ConcatDataset([Subset(first, [4, 2]), first])
    for examples in (DatasetExamples(joined), as_examples(joined)):
        assert examples.class_names == NAMES
        assert examples.labels[:4].tolist() == [1, 2, 0, 1]
    other = Rows(first.row, 20, classes=NAMES[::-1])
    with pytest.raises(InputError, match="different class names"):
        DatasetExamples(ConcatDataset([first, other]))


def test_ids_are_told_or_are_files(tmp_path: Path) -> None:
    rows = Rows(lambda index: (IMAGES[index], int(LABELS[index]), f"photo {index}"))
    examples = DatasetExamples(rows, ids=2)
    findings = unpoison.scan(network(), examples, method="spectral-signatures")
    assert list(findings.ids or ()) == [f"photo {index}" for index in range(30)]
    assert findings.name_of(7) == "photo 7"
    findings.save(tmp_path / "findings")
    assert unpoison.detectors.Findings.load(tmp_path / "findings").ids == findings.ids
    part = examples.subset([5, 3])
    assert list(part.ids or ()) == ["photo 5", "photo 3"]
    samples = [(str(tmp_path / f"cat/{index}.png"), int(LABELS[index])) for index in range(30)]
    (tmp_path / "cat").mkdir()
    for path, _ in samples:
        Path(path).write_bytes(b"")
    files = Rows(lambda index: (IMAGES[index], int(LABELS[index])), samples=samples, root=str(tmp_path))
    large = DatasetExamples(files, memory_bytes=0)
    assert list(large.ids or ())[:2] == ["cat/0.png", "cat/1.png"]
    assert large.fingerprint.startswith("files:")


def test_the_fingerprint_says_what_it_is_of() -> None:
    kept = DatasetExamples(TensorDataset(IMAGES, LABELS))
    assert ":" not in kept.fingerprint
    assert large().fingerprint.startswith("rows:")
    assert large().fingerprint == large().fingerprint
    assert large().content_fingerprint() == large().content_fingerprint()
    relabelled = LABELS.clone()
    relabelled[17] = (relabelled[17] + 1) % 3
    other = DatasetExamples(TensorDataset(IMAGES, relabelled))
    assert other.fingerprint != kept.fingerprint
    assert large().subset(range(30)).fingerprint == large().fingerprint
    assert large().subset(range(29)).fingerprint != large().fingerprint
    asked, fresh = large(), large().subset([3, 4])
    assert asked.fingerprint
    assert asked.channel_statistics
    part = asked.subset([3, 4])
    assert part.fingerprint == fresh.fingerprint
    assert part.channel_statistics == fresh.channel_statistics != asked.channel_statistics


def test_findings_of_one_set_are_not_used_for_another() -> None:
    findings = unpoison.scan(network(), large(), method="spectral-signatures")
    changed = Rows(lambda index: (IMAGES[index] // 2, int(LABELS[index])), classes=NAMES)
    with pytest.raises(unpoison.errors.MismatchError):
        unpoison.heal(network(), DatasetExamples(changed, memory_bytes=0), findings, method="ssd")


def test_what_needs_8_bit_images_gets_them_or_says_so() -> None:
    read = as_training_set(large())
    assert read.fingerprint == HELD.fingerprint
    assert torch.equal(as_training_set(large().subset([3, 1])).images, IMAGES[[3, 1]])
    floats = DatasetExamples(TensorDataset(torch.rand(30, 3, 6, 6), LABELS))
    for method in ("frequency",):
        with pytest.raises(InputError, match=f"{method}: works on 8-bit images alone") as error:
            unpoison.scan(network(), floats, method=method)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="8-bit images"):
        as_training_set(TensorExamples(torch.rand(4, 2), torch.arange(4)))


def test_grey_pictures_among_coloured_ones_are_coloured() -> None:
    def row(index: int) -> Any:
        shown = IMAGES[index].permute(1, 2, 0).numpy()
        return Image.fromarray(shown[..., 0] if index % 2 else shown), int(LABELS[index])

    inputs, _ = DatasetExamples(Rows(row), memory_bytes=0).batch(0, 4)
    assert tuple(inputs.shape) == (4, 3, 6, 6)
    assert torch.equal(inputs[1], IMAGES[1, :1].expand(3, -1, -1).float() / 255)


def test_inputs_of_other_kinds_are_given_as_they_are() -> None:
    tokens = {"input_ids": torch.randint(0, 9, (30, 5)), "attention_mask": torch.ones(30, 5).long()}
    rows = Rows(lambda index: {**{key: part[index] for key, part in tokens.items()}, "label": index % 3})
    inputs, labels = DatasetExamples(rows).batch(2, 5)
    assert {key: part.dtype for key, part in inputs.items()} == dict.fromkeys(tokens, torch.int64)
    assert torch.equal(inputs["input_ids"], tokens["input_ids"][2:5])
    assert labels.tolist() == [2, 0, 1]
    half = DatasetExamples([(torch.rand(3).half(), row % 2) for row in range(4)])
    assert half.batch(0, 2)[0].dtype == torch.float32
    arrays = DatasetExamples((np.arange(12.0).reshape(4, 3), np.array([0, 1, 0, 1])))
    assert arrays.batch(1, 2)[0].tolist() == [[3.0, 4.0, 5.0]]


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ({"image": [1], "label": [0]}, "mapping"),
        ([], "no examples"),
        (iter([1]), "map-style"),
        ([torch.zeros(3)], "pair"),
        ([(torch.zeros(3), 0), (torch.zeros(4), 1)], "row 1: its input is of shape"),
        ([(torch.zeros(3), 0), (torch.full((3,), torch.nan), 1)], "row 1: an input is NaN"),
        ([(torch.zeros(3), 0), (torch.zeros(3), torch.tensor([0.0, 1.0]))], "one-hot"),
        ([(torch.zeros(3), 0), (torch.zeros(3), -1)], "label -1"),
        ([(torch.zeros(3), 0), (torch.zeros(3), 0.5)], "whole number"),
        ([({"a": 1}, "cat"), ({"a": 1}, 2)], "input"),
        ([((torch.zeros(3), torch.zeros(3)), 0)], "tuple"),
        ([(torch.zeros(3, 4, 4).long(), 0), (torch.zeros(3, 4, 4).long(), 1)], "convert them to uint8"),
        ([{"photo": torch.zeros(3), "label": 0}], "'photo'"),
        ([{"image": torch.zeros(3), "species": 0}], "'species'"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(dataset: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        DatasetExamples(dataset)
    assert "\n" not in str(error.value)


def test_an_observation_is_given_as_the_dataset_gives_inputs() -> None:
    values = torch.randn(30, 12)
    model = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    examples = DatasetExamples(TensorDataset(values, LABELS))
    findings = unpoison.trace(model, examples, unpoison.Observation(values[3]), method="ek-fac")
    assert findings.observation is not None
    assert torch.equal(findings.observation.inputs, values[3:4])  # type: ignore[arg-type]
    both = [unpoison.Observation(values[3], 1), unpoison.Observation(values[3], 1)]
    assert len(unpoison.workflow.combined(both)) == 2
    with pytest.raises(InputError, match="give it as the dataset gives it"):
        unpoison.trace(model, examples, unpoison.Observation(values[3, :5][None, None]), method="ek-fac")
    with pytest.raises(InputError, match="variations are of images"):
        unpoison.trace(model, examples, unpoison.Observation(values[3]), method="delta-influence")


def test_a_dataset_larger_than_memory_must_be_wrapped() -> None:
    image = torch.zeros(3, 224, 224, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"GB.*DatasetExamples"):
        as_examples(Rows(lambda index: (image, index % 3), 10**7))


HOLD = """
import json, resource, sys, torch, unpoison
from unpoison.data import DatasetExamples
from torch import nn

class Made:
    targets = [row % 4 for row in range(int(sys.argv[1]))]
    def __len__(self): return len(self.targets)
    def __getitem__(self, row):
        if not 0 <= row < len(self): raise IndexError(row)
        image = torch.empty(3, 64, 64).fill_((row % 97) / 97)
        image[row % 3, row % 64] = 1.0
        return image, row % 4

torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
few = DatasetExamples([Made()[row] for row in range(300)], memory_bytes=0)
query = unpoison.Observation(few.at([1])[0])
for verb in (lambda e: unpoison.scan(model, e, method="spectral-signatures"),
             lambda e: unpoison.trace(model, e, query, method="ek-fac")):
    verb(few)
before = peak()
examples = DatasetExamples(Made(), memory_bytes=0)
unpoison.scan(model, examples, method="spectral-signatures")
unpoison.trace(model, examples, query, method="ek-fac")
print(json.dumps({"before": before, "after": peak()}))
"""


def test_memory_does_not_grow_with_the_set() -> None:
    """12,000 inputs take 590 MB; scan and trace hold none of them but a batch."""
    done = subprocess.run(
        [sys.executable, "-c", HOLD, "12000"], check=True, stdout=subprocess.PIPE, text=True
    )
    told = json.loads(done.stdout)
    assert told["after"] - told["before"] < 120_000_000


def test_the_fingerprint_of_a_part_does_not_depend_on_what_was_asked_before() -> None:
    rows = [(torch.randn(5), row % 2) for row in range(20)]
    asked, new = (DatasetExamples(rows, identity="content", memory_bytes=0) for _ in range(2))
    whole = asked.fingerprint
    part = new.subset([1, 2, 3])
    assert part.fingerprint == asked.subset([1, 2, 3]).fingerprint != whole
    assert new.fingerprint == whole


def test_a_label_that_a_tensor_dataset_has_not_is_named() -> None:
    pair = TensorDataset(torch.randn(4, 3), torch.arange(4))
    with pytest.raises(InputError, match="the part 5, found 2 parts"):
        DatasetExamples(pair, labels=5)
