"""Two processes give the factors and scores of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from unpoison.data import TensorExamples
from unpoison.influence import fit_factors, precondition, score
from unpoison.tasks import ClassificationTask

WORKER = """
import sys
import torch
from safetensors.torch import save_file
from torch import distributed

sys.path.insert(0, sys.argv[2])
from test_shards import work

torch.set_num_threads(1)
place = f"file://{sys.argv[1]}/meeting"
distributed.init_process_group("gloo", init_method=place, rank=int(sys.argv[3]), world_size=2)
save_file(work(), f"{sys.argv[1]}/{sys.argv[3]}.safetensors")
distributed.destroy_process_group()
"""


def work() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(2, 4, 3, bias=False), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3)
        ).double()
    images = torch.randn(301, 2, 6, 6, generator=generator, dtype=torch.float64)
    examples = TensorExamples(images, torch.randint(0, 3, (301,), generator=generator))
    task = ClassificationTask()
    factors = fit_factors(model, examples, task, seed=3, batch_size=64)
    few = fit_factors(
        model, examples, task, seed=3, covariance_examples=101, eigenvalue_examples=77, batch_size=16
    )
    queries = precondition(model, factors, examples.batch(0, 4), task)
    scores = score(model, queries, examples, task, gradient_norms=True, self_influence=True, batch_size=64)
    part = score(model, queries, examples, task, start=10, stop=20)
    torch.testing.assert_close(part.values, scores.values[:, 10:20])
    assert scores.gradient_norms is not None
    assert scores.self_influence is not None
    return {
        "eigenvalues": factors.layers["0"].eigenvalues,
        "of few": few.layers["0"].eigenvalues,
        "values": scores.values.contiguous(),
        "norms": scores.gradient_norms,
        "self": scores.self_influence,
    }


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    here = str(Path(__file__).parent)
    processes = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), here, str(rank)], env=environment)
        for rank in range(2)
    ]
    expected = work()
    assert [process.wait(120) for process in processes] == [0, 0]
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9 * float(value.abs().max()))
