"""Poisons from and for other tools: there and back, damaged, and hostile."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from unpoison.data import TrainingSet
from unpoison.errors import InputError, MismatchError
from unpoison.threats import (
    Backdoor,
    Goal,
    PatchTrigger,
    PoisonSet,
    TargetedMisclassification,
    read_metapoison,
    read_poison_table,
    read_triple,
    write_metapoison,
    write_poison_table,
    write_triple,
)


def drawn(n: int, channels: int, seed: int, name: str) -> TrainingSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, channels, 6, 5), dtype=torch.uint8, generator=generator)
    return TrainingSet(images, torch.arange(n) % 3, ("ant", "bee", "cow"), name)


def poison(
    clean: TrainingSet, goal: Goal, indices: tuple[int, ...] = (2, 5, 8, 11), eps: int = 8
) -> PoisonSet:
    chosen = clean.subset(indices)
    change = torch.randint(-eps, eps + 1, chosen.images.shape, generator=torch.Generator().manual_seed(9))
    return PoisonSet.of(
        clean,
        indices=indices,
        images=(chosen.images.int() + change).clamp(0, 255).to(torch.uint8),
        given_labels=chosen.labels,
        goal=goal,
        attack="by hand",
        configuration={},
        seed=0,
    )


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def sets(request: pytest.FixtureRequest) -> tuple[TrainingSet, TrainingSet]:
    return drawn(30, request.param, 0, "train"), drawn(9, request.param, 1, "test")


def targeted(test: TrainingSet) -> TargetedMisclassification:
    return TargetedMisclassification.of(test, 4, target=2)


def assert_same(left: PoisonSet, right: PoisonSet) -> None:
    for what in ("indices", "images", "clean_labels", "given_labels", "linf", "l2"):
        assert torch.equal(getattr(left, what), getattr(right, what)), what


Sets = tuple[TrainingSet, TrainingSet]


def test_the_triple_there_and_back(sets: Sets, tmp_path: Path) -> None:
    clean, test = sets
    made = poison(clean, targeted(test))
    write_triple(tmp_path / "triple", made, test)
    back = read_triple(tmp_path / "triple", clean, eps=8)
    assert_same(back, made)
    assert isinstance(back.goal, TargetedMisclassification)
    assert torch.equal(back.goal.images, targeted(test).images)
    assert (back.goal.true_label, back.goal.target) == (1, 2)


def test_the_triple_is_what_others_read(sets: Sets, tmp_path: Path) -> None:
    clean, test = sets
    made = poison(clean, targeted(test))
    write_triple(tmp_path, made, test)
    poisons, indices, target = (
        pickle.loads((tmp_path / f"{name}.pickle").read_bytes())
        for name in ("poisons", "base_indices", "target")
    )
    assert [type(image) for image, _ in poisons] == [Image.Image] * 4
    assert {image.mode for image, _ in poisons} == {"RGB"}
    assert [label for _, label in poisons] == [2, 2, 2, 2]
    assert indices.tolist() == [2, 5, 8, 11]
    assert target[1] == 1
    assert np.array_equal(np.array(target[0])[..., 0], test.images[4, 0].numpy())


def test_a_backdoor_goes_through_the_triple_with_its_patch(sets: Sets, tmp_path: Path) -> None:
    clean, test = sets
    goal = Backdoor(PatchTrigger.white_corner(2), source=1, target=2)
    write_triple(tmp_path, poison(clean, goal), test)
    back = read_triple(tmp_path, clean).goal
    assert isinstance(back, Backdoor)
    assert (back.source, back.target) == (1, 2)
    if clean.image_shape[0] == 3:
        assert torch.equal(back.trigger.stamp(test.images), goal.trigger.stamp(test.images))


def dump(folder: Path, name: str, value: Any, protocol: int = 4) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.pickle").write_bytes(pickle.dumps(value, protocol=protocol))


def picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_foreign_triples_of_every_protocol_without_a_target_label(
    sets: Sets, tmp_path: Path, protocol: int
) -> None:
    clean, test = sets
    made = poison(clean, targeted(test))
    pairs = [(picture(image), np.int64(2)) for image in made.images]
    dump(tmp_path, "poisons", list(reversed(pairs)), protocol)
    dump(tmp_path, "base_indices", np.array([11, 8, 5, 2]), protocol)
    dump(tmp_path, "target", picture(test.images[4]), protocol)
    with pytest.raises(InputError, match="does not contain the class of the target image; give true_label="):
        read_triple(tmp_path, clean)
    back = read_triple(tmp_path, clean, true_label=1)
    assert_same(back, made)
    (tmp_path / "target.pickle").unlink()
    with pytest.raises(InputError, match="no such file; give goal= instead"):
        read_triple(tmp_path, clean)
    assert read_triple(tmp_path, clean, goal=made.goal).goal is made.goal


def test_of_two_poisons_of_one_index_the_later_counts(sets: Sets, tmp_path: Path) -> None:
    clean, test = sets
    made = poison(clean, targeted(test))
    dump(tmp_path, "poisons", [(picture(image), 2) for image in made.images])
    dump(tmp_path, "base_indices", [2, 5, 2, 11])
    back = read_triple(tmp_path, clean, goal=made.goal)
    assert back.indices.tolist() == [2, 5, 11]
    assert torch.equal(back.images[0], made.images[2])


def test_eps_is_checked_again_after_reading(sets: Sets, tmp_path: Path) -> None:
    clean, test = sets
    made = poison(clean, targeted(test))
    write_triple(tmp_path / "triple", made, test)
    write_poison_table(tmp_path / "table", made)
    for read in (
        lambda: read_triple(tmp_path / "triple", clean, eps=7),
        lambda: read_poison_table(tmp_path / "table", clean, made.goal, eps=7),
    ):
        with pytest.raises(InputError, match=r"changes it by 8/255, more than eps 7; is this the clean set"):
            read()
    assert float(read_triple(tmp_path / "triple", clean, eps=7.5).linf.max()) == 8


class Hostile:
    """Runs a command when a pickle of it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["poisons", "base_indices", "target"])
def test_a_hostile_pickle_is_refused_and_does_nothing(sets: Sets, tmp_path: Path, name: str) -> None:
    clean, test = sets
    folder = tmp_path / "triple"
    write_triple(folder, poison(clean, targeted(test)), test)
    dump(folder, name, [(Hostile(f"touch {tmp_path / 'harm'}"), 2)])
    with pytest.raises(InputError, match=r"refused: the pickle asks for (posix|nt)\.system") as error:
        read_triple(folder, clean)
    assert not (tmp_path / "harm").exists()
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="refused"):
        read_metapoison(folder / f"{name}.pickle", clean)


def test_a_tensor_is_refused_since_torch_runs_a_pickle_to_read_it(sets: Sets, tmp_path: Path) -> None:
    clean, test = sets
    made = poison(clean, targeted(test))
    write_triple(tmp_path, made, test)
    dump(tmp_path, "target", (picture(test.images[4]), 1, torch.zeros(3, 2, 2), [0, 0]))
    with pytest.raises(InputError, match="refused: the pickle asks for torch"):
        read_triple(tmp_path, clean)
    assert_same(read_triple(tmp_path, clean, goal=made.goal), made)


class Forged:
    """An image with a state of our choice."""

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        return Image.Image, (), list(self.state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (({}, "RGB", (5, 6), None, b"\0" * 89), "more or fewer pixels than its size says"),
        (({}, "RGB", (10**6, 10**6), None, b""), "more or fewer pixels than its size says"),
        (({}, "RGB", (-5, -6), None, b"\0" * 90), "more or fewer pixels than its size says"),
        (({}, "F", (5, 6), None, b"\0" * 120), "an image of mode 'F'"),
        (({}, "RGB", (5, 6), None, 7), "an image of mode"),
        (({},), "cannot be read"),
    ],
)
def test_forged_images_are_refused(sets: Sets, tmp_path: Path, state: tuple[Any, ...], message: str) -> None:
    clean, test = sets
    dump(tmp_path, "poisons", [(Forged(*state), 2)])
    dump(tmp_path, "base_indices", [2])
    with pytest.raises(InputError, match=message):
        read_triple(tmp_path, clean, goal=targeted(test))


@pytest.mark.parametrize(
    ("poisons", "indices", "message"),
    [
        ({}, [2], "must hold a list"),
        ([], [], "must hold a list"),
        ([7], [2], "poison 0: must be a pair"),
        ([("image", 2)], [2], "poison 0: is not an image"),
        ([(Image.new("RGB", (5, 6)), "cow")], [2], "label 'cow' is not a class number"),
        ([(Image.new("RGB", (5, 6)), True)], [2], "label True is not a class number"),
        ([(Image.new("RGB", (5, 6)), 3)], [2], r"given label is outside 0\.\.2"),
        ([(Image.new("RGB", (6, 5)), 2)], [2], "is 5x6 pixels, the images of train are 6x5"),
        ([(Image.new("RGB", (5, 6)), 2)], [2, 5], "1 poisons, but 2 base indices"),
        ([(Image.new("RGB", (5, 6)), 2)], [99], "99"),
        ([(Image.new("RGB", (5, 6)), 2)], [-1], "whole numbers >= 0"),
        ([(Image.new("RGB", (5, 6)), 2)], [0.5], "whole numbers >= 0"),
        ([(Image.new("RGB", (5, 6)), 2)], "no", "whole numbers >= 0"),
    ],
)
def test_triples_that_do_not_fit_are_refused(
    sets: Sets, tmp_path: Path, poisons: Any, indices: Any, message: str
) -> None:
    clean, test = sets
    dump(tmp_path, "poisons", poisons)
    dump(tmp_path, "base_indices", indices)
    with pytest.raises(InputError, match=message) as error:
        read_triple(tmp_path, clean, goal=targeted(test))
    assert "\n" not in str(error.value)


def test_colour_does_not_become_grey(tmp_path: Path) -> None:
    grey, test = drawn(30, 1, 0, "train"), drawn(9, 1, 1, "test")
    pixels = np.zeros((6, 5, 3), np.uint8)
    pixels[0, 0, 0] = 9
    dump(tmp_path, "poisons", [(Image.fromarray(pixels), 2)])
    dump(tmp_path, "base_indices", [2])
    with pytest.raises(InputError, match="has 3 channels, the images of train have 1"):
        read_triple(tmp_path, grey, goal=targeted(test))


def test_goals_that_the_triple_has_no_place_for(sets: Sets, tmp_path: Path) -> None:
    clean, test = sets
    several = TargetedMisclassification.of(test, (1, 4), target=2)
    everyone = Backdoor(PatchTrigger.white_corner(2), source=None, target=2)
    holes = Backdoor(PatchTrigger.four_pixels(), source=1, target=2)
    for goal, message in (
        (several, "holds one target image, this goal has 2"),
        (everyone, "one source class"),
        (holes, "patches without holes"),
    ):
        with pytest.raises(InputError, match=message):
            write_triple(tmp_path / "triple", poison(clean, goal), test)
        assert not (tmp_path / "triple").exists()


def test_metapoisons_dict_there_and_back(sets: Sets, tmp_path: Path) -> None:
    clean, test = sets
    made = poison(clean, targeted(test))
    write_metapoison(tmp_path / "poisondataset-60.pkl", made, clean, test)
    back = read_metapoison(tmp_path / "poisondataset-60.pkl", clean, eps=8)
    assert_same(back, made)
    assert isinstance(back.goal, TargetedMisclassification)
    assert (back.goal.true_label, back.goal.target) == (1, 2)
    content = pickle.loads((tmp_path / "poisondataset-60.pkl").read_bytes())
    assert sorted(content) == ["xtarget", "xtrain", "xvalid", "ytarget", "ytargetadv", "ytrain", "yvalid"]
    assert content["ytrain"].tolist() == sorted(clean.labels.tolist())
    assert np.array_equal(content["xtrain"][20:24], made.images.permute(0, 2, 3, 1).float().numpy())


def test_metapoisons_dict_in_another_scale_and_with_byte_keys(sets: Sets, tmp_path: Path) -> None:
    clean, test = sets
    made = poison(clean, targeted(test))
    file = tmp_path / "poisondataset-60.pkl"
    write_metapoison(file, made, clean, test)
    content = pickle.loads(file.read_bytes())
    scaled = {
        key.encode(): (value / 255 if key[0] == "x" else value.astype(np.float32))
        for key, value in content.items()
    }
    file.write_bytes(pickle.dumps(scaled, protocol=2))
    assert_same(read_metapoison(file, clean), made)


def test_metapoisons_dict_of_another_set_is_refused(sets: Sets, tmp_path: Path) -> None:
    clean, test = sets
    file = tmp_path / "poisondataset-60.pkl"
    write_metapoison(file, poison(clean, targeted(test)), clean, test)
    with pytest.raises(MismatchError, match="examples are not in other"):
        read_metapoison(file, drawn(30, clean.image_shape[0], 5, "other"))
    with pytest.raises(MismatchError, match="has 30 examples and 30 labels, train has 29"):
        read_metapoison(file, clean.without([0]))
    content = pickle.loads(file.read_bytes())
    for key, value, message in (
        ("xtrain", content["xtrain"][..., 0, :], "xtrain: has shape"),
        ("ytargetadv", np.array([1, 2]), "must name one class each"),
        ("ytrain", content["ytrain"] + 0.5, "ytrain: must be class numbers"),
        ("xtarget", "picture", "xtarget: must be an array of finite numbers"),
    ):
        file.write_bytes(pickle.dumps({**content, key: value}))
        with pytest.raises(InputError, match=message):
            read_metapoison(file, clean)
    del content["ytarget"]
    file.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="lacks the entry 'ytarget'"):
        read_metapoison(file, clean)
    file.write_bytes(pickle.dumps([1]))
    with pytest.raises(InputError, match="must hold a mapping, found list"):
        read_metapoison(file, clean)
    patched = poison(clean, Backdoor(PatchTrigger.white_corner(2), source=1, target=2))
    with pytest.raises(InputError, match="cannot express a 'backdoor'"):
        write_metapoison(file, patched, clean, test)


@pytest.mark.parametrize("name", ["folder", "poisons.parquet"])
def test_tables_there_and_back(sets: Sets, tmp_path: Path, name: str) -> None:
    clean, test = sets
    made = poison(clean, targeted(test))
    write_poison_table(tmp_path / name, made)
    assert_same(read_poison_table(tmp_path / name, clean, made.goal, eps=8), made)


def test_a_table_may_name_classes(sets: Sets, tmp_path: Path) -> None:
    clean, test = sets
    write_poison_table(tmp_path / "t", poison(clean, targeted(test)))
    table = tmp_path / "t" / "poisons.csv"
    table.write_text("label,file,index\nant,images/5.png,7\n")
    back = read_poison_table(tmp_path / "t", clean, targeted(test))
    assert (back.indices.tolist(), back.given_labels.tolist()) == ([7], [0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5,images/5.png,dog", "line 2: label dog: no such class; give a name"),
        ("5,images/5.png,3", "label 3: no such class"),
        ("-5,images/5.png,2", "index '-5' is not a whole number"),
        ("5,images/6.png,2", "no such file"),
        ("5,../secret.png,2", "must lie inside the folder"),
        ("5,/secret.png,2", "must lie inside the folder"),
        ("5,images/5.png", "has no 'given_label' or 'label'"),
        ("99,images/5.png,2", "99"),
        ("", "holds no poisons"),
    ],
)
def test_tables_that_do_not_fit_are_refused(sets: Sets, tmp_path: Path, line: str, message: str) -> None:
    clean, test = sets
    write_poison_table(tmp_path / "t", poison(clean, targeted(test)))
    (tmp_path / "t" / "poisons.csv").write_text(f"index,file,given_label\n{line}\n")
    with pytest.raises(InputError, match=message) as error:
        read_poison_table(tmp_path / "t", clean, targeted(test))
    assert "\n" not in str(error.value)


def test_parquet_files_that_do_not_fit_are_refused(sets: Sets, tmp_path: Path) -> None:
    clean, test = sets
    goal = targeted(test)
    with pytest.raises(InputError, match="no such file or folder"):
        read_poison_table(tmp_path / "none.parquet", clean, goal)
    with pytest.raises(InputError, match=r"poisons\.csv: no such file"):
        read_poison_table(tmp_path, clean, goal)
    file = tmp_path / "p.parquet"
    file.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(InputError, match="cannot be read as parquet"):
        read_poison_table(file, clean, goal)
    for image, message in ((b"GIF89a", "does not decode"), ("text", "has no image bytes")):
        pyarrow.parquet.write_table(pyarrow.table({"index": [1], "label": [1], "image": [image]}), file)
        with pytest.raises(InputError, match=message):
            read_poison_table(file, clean, goal)
