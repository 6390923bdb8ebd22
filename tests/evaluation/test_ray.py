"""The same rows from a real Ray cluster of two workers, one of which is killed in the middle."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_stages import InlineExecutor, make_plan
from tiny_recipe import write_recipe

from unpoison.errors import InputError, MissingExtraError
from unpoison.evaluation import Experiment, RayExecutor, plan, sweep

# Ray leaves sockets and processes to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "default::DeprecationWarning")


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'unpoison\[ray\]'"):
        RayExecutor(1)


@pytest.mark.parametrize(
    ("threads", "share", "said"),
    [
        (1, 0.5, r"a worker needs 0\.5 GPU, the cluster has 0"),
        (4, 0.0, "a worker needs 4 CPU, the cluster has 2"),
    ],
)
def test_what_the_cluster_does_not_have_is_not_waited_for(
    threads: int, share: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[bool] = []
    fake = SimpleNamespace(
        init=lambda **_: None, shutdown=lambda: stopped.append(True), cluster_resources=lambda: {"CPU": 2.0}
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    with pytest.raises(InputError, match=said):
        RayExecutor(1, threads=threads, gpu_share=share)
    assert stopped


def test_the_same_rows_though_a_worker_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(InputError, match="gpu_share: 2 is outside"):
        RayExecutor(1, gpu_share=2.0)
    work = plan(Experiment.read(write_recipe(tmp_path)))
    expected = sweep(work, tmp_path / "inline", InlineExecutor())
    fake = make_plan(tmp_path / "log", trials=4, killer="find 2")
    with RayExecutor(2, threads=work.threads) as executor:
        found = sweep(work, tmp_path / "ray", executor)
        killed = sweep(fake, tmp_path / "ray", executor)
    assert found.deterministic.equals(expected.deterministic)
    assert (tmp_path / "log").with_suffix(".killed").exists()
    assert killed.failures == ()
    assert (
        killed.fingerprint
        == sweep(make_plan(tmp_path / "other", trials=4), tmp_path / "inline", InlineExecutor()).fingerprint
    )
