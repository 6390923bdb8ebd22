"""A few real steps of the trainers of Hugging Face and Lightning, where installed: `make compat`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision_shim import without_cuda_operators

from unpoison.data import as_examples
from unpoison.defenses import EPIC, RandomDrop
from unpoison.errors import InputError, MismatchError
from unpoison.training import TrainingRecord

pytestmark = pytest.mark.filterwarnings("ignore")
COUNT = 48


def inputs_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(COUNT) % 2
    return torch.randn(COUNT, 3, 8, 8, generator=generator) + labels[:, None, None, None], labels


def check_record(record: TrainingRecord, epochs: int) -> None:
    assert len(record.order) == epochs
    assert sorted(record.order[0].tolist()) == list(range(COUNT))
    assert record.order[0].tolist() != list(range(COUNT))
    kept = (~record.dropped).nonzero()[:, 0].tolist()
    assert sorted(record.order[-1].tolist()) == kept


if find_spec("transformers") and find_spec("datasets"):

    def vit() -> Any:
        import transformers

        torch.manual_seed(0)
        config = transformers.ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=2,
        )
        return transformers.ViTForImageClassification(config)

    def hf_set() -> Any:
        import datasets

        images, labels = inputs_and_labels()
        columns = {"pixel_values": images.tolist(), "label": labels.tolist()}
        return datasets.Dataset.from_dict(columns).with_format("torch")

    def arguments(folder: Path, **more: Any) -> Any:
        import transformers

        return transformers.TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=3,
            per_device_train_batch_size=16,
            report_to=[],
            use_cpu=True,
            save_strategy="epoch",
            disable_tqdm=True,
            **more,
        )

    @pytest.mark.parametrize(
        "defense",
        [None, RandomDrop(sizes=((1, 20),)), EPIC(subset_size=0.4, interval=1, warm_up=1)],
        ids=lambda one: type(one).__name__,
    )
    def test_a_trainer_is_taken_down_and_defended(defense: Any, tmp_path: Path) -> None:
        without_cuda_operators()
        import transformers

        from unpoison.integrations.huggingface import Recording, from_hf

        dataset, model = hf_set(), vit()
        examples = from_hf(dataset)
        before = [one.detach().clone() for one in model.parameters()]
        recording = Recording(examples, defense=defense)
        trainer = transformers.Trainer(
            model, arguments(tmp_path), train_dataset=dataset, callbacks=[recording]
        )
        trainer.train()
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        record = recording.record
        check_record(record, epochs=3)
        assert bool(record.dropped.any()) == (defense is not None)
        if isinstance(defense, RandomDrop):
            assert int(record.dropped.sum()) == 20
            assert trainer.state.global_step == 3 + 2 + 2
        assert recording.checked(from_hf(dataset)).fingerprint == record.fingerprint
        with pytest.raises(MismatchError, match="the very set"):
            recording.checked(from_hf(dataset.select(range(COUNT - 1))))
        step, place = record.checkpoints[-1]
        assert step == trainer.state.global_step
        kept = TrainingRecord.load(Path(place) / "unpoison")
        assert torch.equal(kept.dropped, record.dropped)
        assert kept.fingerprint == examples.fingerprint

    def test_a_resumed_trainer_goes_on_from_its_record(tmp_path: Path) -> None:
        without_cuda_operators()
        import transformers

        from unpoison.integrations.huggingface import Recording, from_hf

        dataset = hf_set()

        class Stop(transformers.TrainerCallback):  # type: ignore[misc]
            def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
                if state.global_step >= 5:
                    control.should_training_stop = True

        def train(*callbacks: Any, resume: str | None = None) -> Any:
            recording = Recording(from_hf(dataset), defense=RandomDrop(sizes=((1, 20), (2, 4))))
            trainer = transformers.Trainer(
                vit(), arguments(tmp_path), train_dataset=dataset, callbacks=[recording, *callbacks]
            )
            trainer.train(resume_from_checkpoint=resume)
            return recording.record

        first = train(Stop())
        assert int(first.dropped.sum()) == 20
        last = train(resume=first.checkpoints[-1][1])
        assert int(last.dropped.sum()) == 24
        assert not (first.dropped & ~last.dropped).any()
        assert [one.tolist() for one in last.order[:2]] == [one.tolist() for one in first.order]

    def test_splits_and_streams_are_refused() -> None:
        without_cuda_operators()
        import datasets

        from unpoison.integrations.huggingface import from_hf

        with pytest.raises(InputError, match="dict of splits"):
            from_hf(datasets.DatasetDict(train=hf_set()))
        with pytest.raises(InputError, match="stream"):
            from_hf(hf_set().to_iterable_dataset())


if find_spec("lightning"):

    @pytest.mark.parametrize("defense", [None, RandomDrop(sizes=((1, 20),))], ids=["alone", "defended"])
    def test_lightning_is_taken_down_and_defended(defense: Any, tmp_path: Path) -> None:
        without_cuda_operators()
        import lightning.pytorch as lightning

        from unpoison.integrations.lightning import Recording

        class Module(lightning.LightningModule):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.network = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
                self.seen: list[Tensor] = []

            def forward(self, images: Tensor) -> Tensor:
                logits: Tensor = self.network(images)
                return logits

            def training_step(self, batch: Any, index: int) -> Tensor:
                self.seen.append(batch[0][:, 0, 0, 0])
                return nn.functional.cross_entropy(self(batch[0]), batch[1])

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.01)

        dataset = TensorDataset(*inputs_and_labels())
        recording = Recording(as_examples(dataset), defense=defense)
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=3,
            accelerator="cpu",
            callbacks=[recording],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, DataLoader(dataset, batch_size=16, shuffle=True))
        record = recording.record
        check_record(record, epochs=3)
        assert int(record.dropped.sum()) == (0 if defense is None else 20)
        drawn = torch.cat([dataset.tensors[0][one, 0, 0, 0] for one in record.order])
        assert torch.equal(torch.cat(module.seen), drawn)
        [checkpoint] = tmp_path.rglob("*.ckpt")
        kept = torch.load(checkpoint, weights_only=True)
        assert kept["unpoison_fingerprint"] == record.fingerprint
        assert record.checkpoints
