"""The log of decisions: what holds, undo and redo, two writers, and a writer that was killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unpoison.errors import InputError, MismatchError
from unpoison.report import VERDICTS, Decisions

N = 6


def open_log(folder: Path, n: int = N, fingerprint: str = "ab") -> Decisions:
    return Decisions(folder / "log" / "decisions.jsonl", fingerprint, n)


Actions = st.lists(
    st.one_of(
        st.tuples(st.sets(st.integers(0, N - 1), min_size=1), st.sampled_from(VERDICTS)),
        st.sampled_from(["undo", "redo"]),
    ),
    max_size=14,
)


@settings(deadline=None, max_examples=40)
@given(actions=Actions)
def test_undo_and_redo_are_those_of_a_list_of_states(
    actions: list, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("log")
    decisions, states, place = open_log(folder), [[0] * N], 0
    for action in actions:
        if action == "undo":
            assert decisions.undo() == (place > 0)
            place = max(place - 1, 0)
        elif action == "redo":
            assert decisions.redo() == (place < len(states) - 1)
            place = min(place + 1, len(states) - 1)
        else:
            examples, verdict = action
            decisions.decide(examples, verdict)
            code = VERDICTS.index(verdict)
            now = [code if index in examples else old for index, old in enumerate(states[place])]
            states, place = [*states[: place + 1], now], place + 1
        assert decisions.codes.tolist() == states[place]
    again = open_log(folder)
    assert again.codes.tolist() == states[place]
    assert again.audit == decisions.audit
    assert (again.can_undo, again.can_redo) == (place > 0, place < len(states) - 1)


def test_a_writer_killed_in_the_middle_of_a_line_loses_that_line_alone(tmp_path: Path) -> None:
    decisions = open_log(tmp_path)
    decisions.decide([1], "blame")
    whole = decisions.path.read_bytes()
    decisions.decide([2, 3], "clear")
    line = decisions.path.read_bytes()[len(whole) :]
    for cut in range(len(line)):
        decisions.path.write_bytes(whole + line[:cut])
        again = open_log(tmp_path)
        assert again.codes.tolist() == [0, 1, 0, 0, 0, 0]
        again.decide([4], "unsure")
        last = open_log(tmp_path)
        # All but the line feed was written: the next writer completes the line.
        complete = cut == len(line) - 1
        assert last.codes.tolist() == [0, 1, *((2, 2) if complete else (0, 0)), 3, 0]
        assert last.damaged == (0 < cut < len(line) - 1)


WRITER = """
import sys
from unpoison.report import Decisions

decisions = Decisions(sys.argv[1], "ab", 400)
for number in range(25):
    decisions.decide(range(number, 400, 7), sys.argv[2])
"""


def test_two_processes_may_write_to_one_log(tmp_path: Path) -> None:
    decisions = open_log(tmp_path, 400)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(decisions.path), verdict])
        for verdict in VERDICTS[1:3]
    ]
    assert [one.wait(60) for one in writers] == [0, 0]
    assert decisions.refresh()
    assert not decisions.refresh()
    assert len(decisions.audit) == 50
    assert decisions.damaged == 0
    np.testing.assert_array_equal(decisions.codes, open_log(tmp_path, 400).codes)


def test_what_is_refused(tmp_path: Path) -> None:
    decisions = open_log(tmp_path)
    with pytest.raises(InputError, match=r"0\.\.5"):
        decisions.decide([6], "blame")
    with pytest.raises(InputError, match="none of"):
        decisions.decide([1], "guilty")  # type: ignore[arg-type]
    assert not decisions.undo()
    assert decisions.audit == ()
    with pytest.raises(MismatchError, match="another training set"):
        open_log(tmp_path, fingerprint="cd")
    with pytest.raises(MismatchError, match="another training set"):
        open_log(tmp_path, 7)
    decisions.path.write_bytes(decisions.path.read_bytes()[:-5])
    assert open_log(tmp_path).path.read_text().endswith("}\n")
    decisions.path.write_text("something else\n")
    with pytest.raises(InputError, match="no log of decisions"):
        open_log(tmp_path)


def test_the_audit_says_when_and_what(tmp_path: Path) -> None:
    decisions = open_log(tmp_path)
    decisions.decide([4, 2], "blame")
    decisions.note("heal", removed=2)
    decisions.undo()
    lines = decisions.path.read_text().splitlines()
    assert [json.loads(line) for line in lines[1:]] == [entry.to_dict() for entry in decisions.audit]
    assert [entry.do for entry in decisions.audit] == ["decide", "note", "undo"]
    assert decisions.audit[0].examples == (2, 4)
    assert decisions.counts() == {"undecided": 6, "blame": 0, "clear": 0, "unsure": 0}
    damaged = {"at": "now", "do": "decide", "as": "blame", "examples": [99]}
    with decisions.path.open("a") as file:
        file.write(json.dumps(damaged) + "\n[]\n")
    assert not decisions.refresh()
    assert decisions.damaged == 2
