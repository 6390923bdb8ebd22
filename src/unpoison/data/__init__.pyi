from ._augment import augment as augment
from ._cifar import read_cifar as read_cifar
from ._datasets import MapStyle as MapStyle
from ._datasets import as_training_set as as_training_set
from ._datasets import from_dataset as from_dataset
from ._examples import Examples as Examples
from ._examples import TensorExamples as TensorExamples
from ._folder import read_folder as read_folder
from ._images import encode_png as encode_png
from ._images import read_image as read_image
from ._load import load as load
from ._npz import read_npz as read_npz
from ._npz import write_npz as write_npz
from ._parquet import image_paths as image_paths
from ._parquet import read_parquet as read_parquet
from ._parquet import write_parquet as write_parquet
from ._restricted_unpickler import read_pickle as read_pickle
from ._restricted_unpickler import write_pickle as write_pickle
from ._sample import sample as sample
from ._splits import Splits as Splits
from ._training_set import TrainingSet as TrainingSet

__all__ = [
    "Examples",
    "MapStyle",
    "Splits",
    "TensorExamples",
    "TrainingSet",
    "as_training_set",
    "augment",
    "encode_png",
    "from_dataset",
    "image_paths",
    "load",
    "read_cifar",
    "read_folder",
    "read_image",
    "read_npz",
    "read_parquet",
    "read_pickle",
    "sample",
    "write_npz",
    "write_parquet",
    "write_pickle",
]
