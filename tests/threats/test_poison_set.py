from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unpoison.data import TrainingSet
from unpoison.errors import InputError, MismatchError
from unpoison.threats import Backdoor, PatchTrigger, PoisonSet


def training_set(seed: int = 0, *, channels: int = 3, name: str = "twelve") -> TrainingSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (12, channels, 6, 6), dtype=torch.uint8, generator=generator)
    return TrainingSet(images, torch.arange(12) % 3, ("a", "b", "c"), name)


def poison(clean: TrainingSet, indices: list[int], /, **changes: Any) -> PoisonSet:
    goal = Backdoor(PatchTrigger.white_corner(), source=None, target=2)
    options: dict[str, Any] = {
        "indices": indices,
        "images": goal.trigger.stamp(clean.images[indices]),
        "given_labels": torch.full((len(indices),), 2),
        "goal": goal,
        "attack": "by hand",
        "configuration": {"strength": 1, "steps": (1, 2)},
        "seed": 7,
    }
    return PoisonSet.of(clean, **{**options, **changes})


def assert_same(left: PoisonSet, right: PoisonSet) -> None:
    for what in ("indices", "images", "clean_labels", "given_labels", "linf", "l2"):
        assert torch.equal(getattr(left, what), getattr(right, what)), what
    for what in ("attack", "configuration", "seed", "fingerprint", "name"):
        assert getattr(left, what) == getattr(right, what), what
    assert left.goal.to_json() == right.goal.to_json()


def test_indices_are_sorted_with_their_images_and_labels() -> None:
    clean = training_set()
    images = PatchTrigger.four_pixels().stamp(clean.images[[7, 1, 3]])
    made = poison(clean, [7, 1, 3], images=images, given_labels=torch.tensor([0, 2, 2]))
    assert made.indices.tolist() == [1, 3, 7]
    assert torch.equal(made.images, images[[1, 2, 0]])
    assert made.given_labels.tolist() == [2, 2, 0]
    assert made.clean_labels.tolist() == [1, 0, 1]


def test_changes_are_measured_in_steps_of_255() -> None:
    images = torch.full((12, 1, 6, 6), 100, dtype=torch.uint8)
    clean = TrainingSet(images, torch.arange(12) % 3, ("a", "b", "c"))
    changed = clean.images[[2, 5]].clone()
    changed[0, 0, 0, 0], changed[0, 0, 0, 1], changed[1, 0, 2, 2] = 103, 96, 250
    made = poison(clean, [2, 5], images=changed)
    assert made.linf.tolist() == [4.0, 150.0]
    assert made.l2.tolist() == [5.0, 150.0]


def test_apply_changes_what_is_listed_and_nothing_else() -> None:
    clean = training_set()
    before = clean.images.clone()
    made = poison(clean, [1, 4])
    poisoned = made.apply(clean)
    member = made.membership(len(clean))
    assert member.nonzero().reshape(-1).tolist() == [1, 4]
    assert torch.equal(poisoned.images[~member], clean.images[~member])
    assert torch.equal(poisoned.labels[~member], clean.labels[~member])
    assert torch.equal(poisoned.images[member], made.images)
    assert poisoned.labels[member].tolist() == [2, 2]
    assert torch.equal(clean.images, before)
    assert poisoned.name == "twelve with by hand poison"


def test_apply_goes_by_content_not_by_name() -> None:
    made = poison(training_set(), [1, 4])
    assert len(made.apply(training_set(name="the same under another name"))) == 12
    with pytest.raises(MismatchError) as error:
        made.apply(training_set(1))
    assert training_set().fingerprint in str(error.value)
    assert training_set(1).fingerprint in str(error.value)
    assert "\n" not in str(error.value)


def test_apply_twice_is_told() -> None:
    clean = training_set()
    made = poison(clean, [1, 4])
    with pytest.raises(MismatchError, match="in it already"):
        made.apply(made.apply(clean))


def test_membership_of_too_small_a_set_is_refused() -> None:
    with pytest.raises(InputError, match="index 4 is outside a training set of 4"):
        poison(training_set(), [1, 4]).membership(4)


@settings(max_examples=20, deadline=None)
@given(
    st.sets(st.integers(0, 11)),
    st.sampled_from([1, 3, 4]),
    st.dictionaries(
        st.text(), st.one_of(st.integers(-(2**53), 2**53), st.text(), st.floats(allow_nan=False))
    ),
    st.integers(0, 2**63 - 1),
)
def test_save_and_load_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    indices: set[int],
    channels: int,
    configuration: dict[str, Any],
    seed: int,
) -> None:
    # Canonical JSON knows no infinity.
    configuration = {
        key: value for key, value in configuration.items() if value not in (float("inf"), -float("inf"))
    }
    directory = tmp_path_factory.mktemp("poison")
    clean = training_set(channels=channels)
    made = poison(clean, sorted(indices), configuration=configuration, seed=seed)
    made.save(directory / "set")
    loaded = PoisonSet.load(directory / "set")
    assert_same(loaded, made)
    assert loaded.apply(clean).fingerprint == made.apply(clean).fingerprint


def test_the_table_for_people(tmp_path: Path) -> None:
    made = poison(training_set(), [1, 4])
    made.save(tmp_path / "set")
    table = pyarrow.parquet.read_table(tmp_path / "set" / "examples.parquet").to_pydict()
    assert table["index"] == [1, 4]
    assert table["clean_label"] == [1, 1]
    assert table["given_label"] == [2, 2]
    assert table["linf"] == made.linf.tolist()
    assert table["l2"] == made.l2.tolist()


def test_saving_replaces_as_a_whole_and_leaves_nothing_beside(tmp_path: Path) -> None:
    poison(training_set(), [1, 4]).save(tmp_path / "set")
    poison(training_set(), [2]).save(tmp_path / "set")
    assert PoisonSet.load(tmp_path / "set").indices.tolist() == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "examples.parquet",
        "poison.json",
        "poison.safetensors",
    ]


def edit(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    poison(training_set(), [1, 4]).save(tmp_path / "set")
    return tmp_path / "set"


def refused(path: Path) -> str:
    with pytest.raises(InputError) as error:
        PoisonSet.load(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_a_truncated_tensor_file_is_refused(stored: Path) -> None:
    file = stored / "poison.safetensors"
    data = file.read_bytes()
    for length in (0, 5, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        assert "damaged or edited" in refused(stored)


def test_one_flipped_bit_is_refused(stored: Path) -> None:
    file = stored / "poison.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert "damaged or edited" in refused(stored)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"attack": "other"},
        {"training_set": {"name": "x", "fingerprint": "0"}},
        {"digest": None},
        {"new": 1},
    ],
    ids=str,
)
def test_edited_json_is_refused(stored: Path, change: dict[str, Any]) -> None:
    edit(stored / "poison.json", change)
    assert "damaged or edited" in refused(stored)


def test_json_may_be_reformatted(stored: Path) -> None:
    made = PoisonSet.load(stored)
    edit(stored / "poison.json", {})
    assert_same(PoisonSet.load(stored), made)


def test_json_that_is_none_is_refused(stored: Path) -> None:
    for text in ("", "[1]", '{"schema": 1', '{"what": "poison set", "schema": 1, "x": NaN}', "{}"):
        (stored / "poison.json").write_text(text)
        refused(stored)


def test_another_schema_is_named(stored: Path) -> None:
    edit(stored / "poison.json", {"schema": 2})
    assert "schema 2" in refused(stored)
    edit(stored / "poison.json", {"schema": 1, "what": "findings"})
    assert "'findings'" in refused(stored)


@pytest.mark.parametrize("file", ["poison.json", "poison.safetensors"])
def test_a_missing_file_is_named(stored: Path, file: str) -> None:
    (stored / file).unlink()
    assert f"{file}: no such file" in refused(stored)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    assert "no such directory" in refused(tmp_path / "nothing")


def test_it_is_never_written_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        poison(training_set(), [1]).save(tmp_path / "set")
    assert (tmp_path / "set").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": [1, 1]}, "named once"),
        ({"indices": [1, 12]}, r"outside 0\.\.11"),
        ({"indices": [-1, 1]}, r"outside 0\.\.11"),
        ({"indices": [1]}, "need uint8 images"),
        ({"given_labels": torch.tensor([0, 3])}, r"outside 0\.\.2"),
        ({"given_labels": torch.tensor([0])}, "1 given labels for 2"),
        ({"images": torch.zeros(2, 3, 6, 6)}, "float32"),
        ({"configuration": {"function": print}}, "cannot be written as JSON"),
        ({"configuration": {"loss": float("nan")}}, "cannot be written as JSON"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_nonsense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        poison(training_set(), [1, 4], **changes)
