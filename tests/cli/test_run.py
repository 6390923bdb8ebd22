from __future__ import annotations

import json
import math
import re
import signal
from pathlib import Path

import jsonschema
import pytest

from unpoison.cli._console import Console
from unpoison.cli._interrupts import Interrupts, Terminated
from unpoison.cli._session import run_directory
from unpoison.errors import InputError
from unpoison.runs import Recorder, RunRecord, check_out, json_value, run_schema

VERBS = ("craft", "train", "trace", "heal", "repair", "bench", "report", "demo")


def a_record() -> RunRecord:
    recorder = Recorder("report", {"out": Path("x")}, 3)
    with recorder.stage("start"):
        pass
    recorder.results["rate"] = math.nan
    return recorder.record()


def test_record_survives_the_disk(tmp_path: Path) -> None:
    record = a_record()
    record.save(tmp_path)
    assert RunRecord.load(tmp_path).to_dict() == record.to_dict()
    assert json.loads((tmp_path / "run.json").read_text())["results"] == {"rate": None}


def test_a_newer_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({**a_record().to_dict(), "schema": 2}))
    with pytest.raises(InputError, match="schema 2"):
        RunRecord.load(tmp_path)


def test_a_record_with_missing_fields_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"schema": 1, "verb": "train"}')
    with pytest.raises(InputError, match="not a record of a run"):
        RunRecord.load(tmp_path)


def test_schema_is_one_and_names_every_field() -> None:
    schema = run_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert set(schema["required"]) == set(schema["properties"]) == set(a_record().to_dict())


@pytest.mark.parametrize("value", [object(), {1: object()}, [b"x"]])
def test_what_json_does_not_know_is_an_error(value: object) -> None:
    with pytest.raises(TypeError, match="no JSON for"):
        json_value(value)


def test_stages_of_one_name_add_up() -> None:
    recorder = Recorder("train", {}, 0)
    with recorder.stage("train"):
        pass
    once = recorder.seconds["train"]
    with recorder.stage("train"):
        pass
    assert recorder.seconds["train"] > once


def test_out_that_is_someone_elses_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not empty"):
        check_out(tmp_path, overwrite=False)
    with pytest.raises(InputError, match=r"holds no run\.json"):
        check_out(tmp_path, overwrite=True)
    with pytest.raises(InputError, match="not a directory"):
        check_out(tmp_path / "thesis.txt", overwrite=True)


def test_out_may_be_new_or_empty_or_an_old_run(tmp_path: Path) -> None:
    check_out(tmp_path, overwrite=False)
    check_out(tmp_path / "new", overwrite=False)
    (tmp_path / "run.json").write_text("{}")
    check_out(tmp_path, overwrite=True)


def test_out_is_not_where_we_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "..", str(tmp_path)):
        with pytest.raises(InputError, match="current directory"):
            check_out(Path(out), overwrite=True)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_signal_removes_the_staging_directory(
    tmp_path: Path, number: signal.Signals, error: type[BaseException]
) -> None:
    def run() -> None:
        with Interrupts() as interrupts, run_directory(tmp_path / "out", interrupts) as staging:
            (staging / "half").write_text("half")
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.raises(error):
        run()
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is before


def test_only_the_first_signal_interrupts() -> None:
    with Interrupts():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        # What is being tidied up now must not be broken into.
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)


def test_a_shielded_block_ends_before_the_signal_is_raised() -> None:
    done = []

    def run() -> None:
        with Interrupts() as interrupts, interrupts.shielded():
            signal.raise_signal(signal.SIGINT)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert done


def test_a_signal_while_the_result_is_put_in_place_comes_too_late() -> None:
    with Interrupts() as interrupts:
        with interrupts.shielded(forget=True):
            signal.raise_signal(signal.SIGINT)
        with interrupts.shielded():
            pass


def test_every_field_is_documented() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "command.md").read_text(encoding="utf-8")
    schema = run_schema()
    parts = {"run.json": schema, **{f"Results of {verb}": schema["$defs"][verb] for verb in VERBS}}
    parts["Results of trace"]["properties"].update(schema["$defs"]["findings"]["properties"])
    for heading, part in parts.items():
        section = re.split(r"\n##+ ", page.split(f"# {heading}\n", 1)[1])[0]
        missing = [name for name in part["properties"] if f"`{name}`" not in section]
        assert not missing, f"{heading}: {missing}"


def test_a_bar_leaves_standard_output_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Console().progress("training") as progress:
        progress("epochs", 1, 3, loss=0.5)
    said = capsys.readouterr()
    assert said.out == ""
    assert "3/3" in said.err


def test_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 1.0, 6.0, 7.0, 8.0])
    monkeypatch.setattr("unpoison.cli._console.time.monotonic", lambda: next(clock))
    with Console().progress("training") as progress:
        for done in (1, 2, 3):
            progress("epochs", done, 3, loss=done)
    assert capsys.readouterr().err.splitlines() == [
        "training ...",
        "training: epochs, 2 of 3, 6 s, loss 2.000",
        "training: done in 8.0 s",
    ]
