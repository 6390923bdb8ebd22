"""How an index grows with the number of examples, and whether it survives being killed.

    python -m recipes.index_growth FOLDER [--sizes 128000 1280000] [--kills 2] [--pieces N]

Images of 3 x 32 x 32, made when they are read: half the pattern of a class, half noise of 8 bits, and a patch
with the label 0 in one of 101 (the poison). A convolutional network of 4,138 parameters is trained on the
first 25,600. The index of each size, with 2,048 numbers and covariances of 51,200 examples, is made by
processes that are ended by `kill -9` when another third (with two kills) of its shards is there; the next
process goes on. Of each:

    seconds    of the processor, by stage, over all processes but what the killed ones had begun
    peak       memory, the largest of any process, in bytes
    same       whether the smallest has the digest of one that was made without a kill, and whether every
               tenth shard, deleted and made again by another process, leaves the digest as it was
    trace      of a test image with the patch by `calibrated` through the index, in a process of its own: the
               first, which calibrates, and two more; `similar` of three examples

FOLDER keeps what is done; with `--pieces`, the call ends after so many processes and the next goes on.
Writes recipes/results/index_growth.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, final

import torch
from benchmarks._harness import encoded, peak_bytes, provenance, say
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import unpoison
from unpoison.detectors import Observation
from unpoison.influence import InfluenceIndex

PIXELS: Final = 3 * 32 * 32
TRAINED: Final = 25_600
FIRST_OF_TEST: Final = 10**7
COVARIANCE_EXAMPLES: Final = 51_200
NUMBERS: Final = 2048  # all 4,138 would be kept of so small a network


@final
class Synthetic:
    """`Examples` that are made when they are read: example j depends on j alone.

    Arguments:
        rows: Int64[n], the examples.
        poisoned: whether one of 101 has the patch and the label 0; else none; None: all have the
            patch, and their own label.
    """

    name, ids, class_names, num_classes = "synthetic images", None, tuple(map(str, range(10))), 10
    input_shape, device = (3, 32, 32), torch.device("cpu")

    def __init__(self, rows: Tensor, *, poisoned: bool | None = True) -> None:
        self.rows, self.poisoned, self.classes = rows, poisoned, rows % 10
        self.patched = (rows % 101 == 7) if poisoned else torch.full((len(rows),), poisoned is None)
        self.labels = torch.where(self.patched, 0, self.classes) if poisoned else self.classes
        self.fingerprint = f"synthetic {poisoned} {len(rows)} {int(rows.sum())}"
        coarse = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        self.patterns = nn.functional.interpolate(coarse, 32, mode="bilinear").mul_(40).sub_(20)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Examples `start` to `stop`."""
        return self.at(torch.arange(start, stop))

    def at(self, indices: Any) -> tuple[Tensor, Tensor]:
        """The examples at `indices`."""
        own = torch.as_tensor(indices)
        # A multiplicative hash: the upper bits of products modulo 2^32 are scattered.
        mixed = self.rows[own].int()[:, None] * PIXELS + torch.arange(PIXELS, dtype=torch.int32)
        mixed.mul_(-1640531535).bitwise_xor_(mixed >> 15).mul_(-2048144777).bitwise_right_shift_(24)
        images = mixed.float().view(-1, *self.input_shape).add_(128)
        images += self.patterns[self.classes[own]]
        images[self.patched[own], :, :8, :8] = 255.0
        return images.round_().clamp_(0, 255).div_(255), self.labels[own]

    def in_batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of at most `size`."""
        rows = torch.arange(len(self)) if order is None else order
        return (self.at(part) for part in torch.split(rows, size))

    def subset(self, indices: Any) -> Synthetic:
        """The examples at `indices`."""
        return Synthetic(self.rows[torch.as_tensor(indices)], poisoned=self.poisoned)


def network(folder: Path) -> nn.Module:
    """A convolutional network, trained at the first call."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    model, path = nn.Sequential(*layers, nn.Linear(256, 10)), folder / "model.safetensors"
    if path.exists():
        load_model(model, path)
        return model.eval()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for inputs, labels in Synthetic(torch.arange(TRAINED)).in_batches(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(path))
    return model.eval()


def build(folder: Path, count: int, name: str) -> None:
    """Make the index, or go on with it; note after each batch what it has taken."""
    model, examples, state = network(folder), Synthetic(torch.arange(count)), folder / f"{name}.json"
    before = json.loads(state.read_text()) if state.exists() else {"seconds": {}, "peak": 0}
    stages, last = dict(before["seconds"]), time.process_time()

    def told(stage: str, done: int, total: int, /, **_: float) -> None:
        nonlocal last
        now = time.process_time()
        stages[stage] = stages.get(stage, 0.0) + now - last
        last = now
        if stage in ("basis", "index") or done == total:
            note({"seconds": stages, "peak": max(before["peak"], peak_bytes())})

    def note(found: dict[str, Any]) -> None:
        state.with_suffix(".new").write_text(json.dumps(found))
        state.with_suffix(".new").replace(state)

    index = InfluenceIndex.build(
        folder / name,
        model,
        examples,
        covariance_examples=COVARIANCE_EXAMPLES,
        numbers=NUMBERS,
        progress=told,
    )
    sizes = {path: path.stat().st_size for path in (folder / name).rglob("*") if path.is_file()}
    found = {"seconds": stages, "peak": max(before["peak"], peak_bytes()), "disk": sum(sizes.values())}
    note({**found, **index.settings})


def trace(folder: Path, count: int, name: str) -> None:
    """Trace test images with the patch through the index, and ask for similar examples."""
    model, examples = network(folder), Synthetic(torch.arange(count))
    held_out = Synthetic(torch.arange(FIRST_OF_TEST, FIRST_OF_TEST + 5000), poisoned=False)
    patched = Synthetic(held_out.rows[:50], poisoned=None)
    with torch.no_grad():
        answers = model(patched.batch(0, 50)[0]).argmax(1)
        right = [(model(one).argmax(1) == labels).float().mean() for one, labels in held_out.in_batches(500)]
    asked = ((answers == 0) & (patched.labels != 0)).nonzero()[:3, 0].tolist()
    began = time.perf_counter()
    index = InfluenceIndex.open(folder / name)
    found: dict[str, Any] = {"accuracy": float(torch.stack(right).mean())}
    found |= {"patch": float((answers[patched.labels != 0] == 0).float().mean())}
    found |= {"open": time.perf_counter() - began, "traces": []}
    for one in asked:
        observation = Observation(patched.at([one])[0], 0, true_label=int(patched.labels[one]))
        began, spent = time.perf_counter(), time.process_time()
        findings = unpoison.trace(model, examples, observation, reference=held_out, index=index)
        taken = {"seconds": time.perf_counter() - began, "processor": time.process_time() - spent}
        flagged = examples.patched[findings.flagged]
        taken |= {"found": findings.poison_found, "p": findings.p_value, "stages": dict(findings.seconds)}
        taken |= {"flagged": len(flagged), "poisons among them": int(flagged.sum())}
        found["traces"].append(taken)
    began = time.perf_counter()
    index.similar([7, 17, count - 1])
    found |= {"similar": time.perf_counter() - began, "peak": peak_bytes()}
    (folder / f"{name}.trace.json").write_text(json.dumps({**found, "poisons": int(examples.patched.sum())}))


def started(stage: str, folder: Path, count: int, name: str) -> subprocess.Popen[bytes]:
    """A stage in a process of its own."""
    code = f"import torch; torch.set_num_threads(1); from recipes.index_growth import *; {stage}"
    return subprocess.Popen([sys.executable, "-c", f"{code}(Path({str(folder)!r}), {count}, {name!r})"])


def ended(process: subprocess.Popen[bytes]) -> None:
    """Wait for a stage that is not killed."""
    if process.wait():
        raise RuntimeError(f"a process ended with {process.returncode}")


@final
class Growth:
    """What is done in a folder, and what is next."""

    def __init__(self, folder: Path, sizes: list[int], kills: int) -> None:
        self.folder, self.sizes, self.kills = folder, sizes, kills
        self.indices = [(count, str(count), kills) for count in sizes]
        self.indices.append((sizes[0], f"{sizes[0]} without kills", 0))

    def read(self, name: str) -> dict[str, Any]:
        """What is noted under a name."""
        path = self.folder / f"{name}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    def piece(self) -> bool:
        """Run one process; False where all is done."""
        for count, name, kills in self.indices:
            if "digest" not in self.read(name):
                self.build(count, name, kills)
            elif kills and "same" not in self.read(f"{name}.remade"):
                self.remake(count, name)
            elif kills and not self.read(f"{name}.trace"):
                ended(started("trace", self.folder, count, name))
            else:
                continue
            return True
        return False

    def build(self, count: int, name: str, kills: int) -> None:
        """Make the index, or a part of it that ends by a kill."""
        every, process = -(-count // 4096), started("build", self.folder, count, name)
        killed = self.read(f"{name}.kills").get("at", [])
        while process.poll() is None:
            there = len(list((self.folder / name / "shards").glob("*.safetensors")))
            if len(killed) < kills and there >= every * (len(killed) + 1) // (kills + 1):
                process.kill()
                (self.folder / f"{name}.kills.json").write_text(json.dumps({"at": [*killed, there]}))
                say(f"{name}: killed with {there} of {every} shards")
                process.wait()
                return
            time.sleep(0.2)
        ended(process)

    def remake(self, count: int, name: str) -> None:
        """Delete every tenth shard and make it again."""
        known, shards = self.read(name), sorted((self.folder / name / "shards").iterdir())
        for path in shards[::10]:
            path.unlink()
        ended(started("build", self.folder, count, name))
        record = {"shards": len(shards[::10]), "same": self.read(name)["digest"] == known["digest"]}
        (self.folder / f"{name}.json").write_text(json.dumps(known))
        (self.folder / f"{name}.remade.json").write_text(json.dumps(record))

    def record(self) -> dict[str, Any]:
        """All that is noted."""
        found = []
        for count, name, kills in self.indices:
            noted, trace = self.read(name), self.read(f"{name}.trace") if kills else {}
            seconds = [round(one["processor"], 1) for one in trace.get("traces", ())]
            row: dict[str, Any] = {"examples": count, "kills": len(self.read(f"{name}.kills").get("at", ()))}
            row |= {f"{stage}_seconds": round(value, 1) for stage, value in noted["seconds"].items()}
            row |= {"peak_mb": round(noted["peak"] / 1e6), "disk_mb": round(noted["disk"] / 1e6)}
            row |= {"remade_shards_same": self.read(f"{name}.remade").get("same")}
            row |= {"first_trace_seconds": seconds[0] if seconds else trace.get("stopped")}
            found.append({**row, "further_trace_seconds": min(seconds[1:], default=None)})
        smallest, whole = (self.read(name)["digest"] for _, name, _ in (self.indices[0], self.indices[-1]))
        return {"growth": found, "same_digest_after_kills": smallest == whole}


def main() -> None:
    """Piece by piece."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128_000, 1_280_000])
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--pieces", type=int, default=sys.maxsize)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "index_growth.json")
    arguments = parser.parse_args()
    growth = Growth(arguments.folder, arguments.sizes, arguments.kills)
    network(arguments.folder)
    for _ in range(arguments.pieces):
        if not growth.piece():
            record = {**growth.record(), **provenance("index_growth", 1)}
            arguments.out.write_text(
                encoded({**record, "command": "python -m recipes.index_growth FOLDER"}), encoding="utf-8"
            )
            return
    say("not done yet; the same call goes on")
    raise SystemExit(3)


if __name__ == "__main__":
    main()
