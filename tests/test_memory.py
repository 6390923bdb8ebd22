"""What is free, what may be taken, and what is said where it is not enough."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from unpoison import _memory
from unpoison._memory import (
    allowed_memory,
    as_bytes,
    check_memory,
    explained,
    free_memory,
    in_words,
    limited,
)
from unpoison.errors import InputError, InsufficientMemoryError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, 1),
        (8_000_000_000, 8_000_000_000),
        ("4096", 4096),
        ("8GB", 8 * 10**9),
        ("8g", 8 * 10**9),
        (" 1.5 GiB ", 3 << 29),
        (".5MB", 500_000),
        ("2kb", 2000),
        ("1TiB", 1 << 40),
    ],
)
def test_bytes_are_read(given: int | str, expected: int) -> None:
    assert as_bytes(given) == expected


@pytest.mark.parametrize("given", [0, -1, True, 1.5, None, "", "GB", "8 cats", "-1GB", "0", "1e9", "8ib"])
def test_what_is_no_number_of_bytes_is_refused(given: object) -> None:
    with pytest.raises(InputError, match="--memory: expected bytes such as") as caught:
        as_bytes(given, called="--memory")  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_free_memory_is_what_the_machine_says() -> None:
    free = free_memory()
    assert free is not None
    assert 0 < free < 1 << 50
    assert allowed_memory() <= free


def _group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_control_groups_of_version_2_bound_what_is_free(tmp_path: Path) -> None:
    own, root = tmp_path / "own", tmp_path / "root"
    own.write_text("0::/outer/inner\n")
    stat = "anon 10\ninactive_file 300\nactive_file 200\nslab 7"
    _group(root / "outer", memory__max=5000, memory__current=1000, memory__stat=stat)
    _group(root / "outer" / "inner", memory__max="max", memory__current=10, memory__stat=stat)
    assert _memory._group_free(own, root) == 5000 - 1000 + 500
    _group(root / "outer" / "inner", memory__max=900)
    assert _memory._group_free(own, root) == 900 - 10 + 500


def test_a_group_that_is_mounted_as_the_root_bounds_what_is_free(tmp_path: Path) -> None:
    own, root = tmp_path / "own", tmp_path / "root"
    own.write_text("0::/docker/0123\n")
    _group(root, memory__max=5000, memory__current=1000, memory__stat="inactive_file 0")
    assert _memory._group_free(own, root) == 4000


def test_control_groups_of_version_1_bound_what_is_free(tmp_path: Path) -> None:
    own, root = tmp_path / "own", tmp_path / "root"
    own.write_text("9:name=systemd:/\n5:cpu,memory:/a/b\n0::/\n")
    files = {"memory__usage_in_bytes": 100, "memory__stat": "total_inactive_file 30\ninactive_file 9"}
    _group(root / "memory", memory__limit_in_bytes=9223372036854771712, **files)
    _group(root / "memory" / "a" / "b", memory__limit_in_bytes=1000, **files)
    assert _memory._group_free(own, root) == 1000 - 100 + 30
    assert _memory._group_free(tmp_path / "missing", root) is None


def test_a_limit_holds_within_its_block() -> None:
    before = allowed_memory()
    with limited("1GB"):
        assert allowed_memory() == 10**9
        with limited(None):
            assert allowed_memory() == 10**9
        with limited(5):
            assert allowed_memory() == 5
    assert allowed_memory() > before // 2


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    parts = {"factors": 3e9, "queries": 6e9, "labels": 8.0}
    with limited("10GB"):
        check_memory("trace", parts, advice="track fewer modules")
    with limited("8GB"), pytest.raises(InsufficientMemoryError) as caught:
        check_memory("trace", parts, advice=lambda allowed: f"{in_words(allowed / 2)} would do")
    assert str(caught.value) == (
        "trace: would take 9.0 GB of memory (queries 6.0 GB, factors 3.0 GB), but memory is set to 8.0 GB; "
        "4.0 GB would do"
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: ..."),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_a_failed_allocation_becomes_one_line(error: Exception) -> None:
    with (
        pytest.raises(InsufficientMemoryError, match=r"^scan: out of memory; give a smaller batch_size$"),
        explained("scan", "give a smaller batch_size"),
    ):
        raise error
    with pytest.raises(InsufficientMemoryError), explained("scan", "x"):
        raise ValueError("the factory failed") from error


def test_other_errors_are_left_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), explained("scan", "x"):
        raise RuntimeError("shape mismatch")
    with (
        pytest.raises(InsufficientMemoryError, match=r"^first$"),
        explained("scan", "x"),
    ):
        raise InsufficientMemoryError("first")


def test_an_allocation_that_is_too_large_is_recognised() -> None:
    with pytest.raises(InsufficientMemoryError), explained("train", "x"):
        torch.empty(1 << 50, dtype=torch.uint8)
