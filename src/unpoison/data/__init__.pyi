from ._augment import augment as augment
from ._examples import Examples as Examples
from ._examples import TensorExamples as TensorExamples
from ._load import load as load
from ._npz import read_npz as read_npz
from ._npz import write_npz as write_npz
from ._sample import sample as sample
from ._splits import Splits as Splits
from ._training_set import TrainingSet as TrainingSet

__all__ = [
    "Examples",
    "Splits",
    "TensorExamples",
    "TrainingSet",
    "augment",
    "load",
    "read_npz",
    "sample",
    "write_npz",
]
