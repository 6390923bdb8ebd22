from ._batches import batch_bounds as batch_bounds
from ._defense import Batch as Batch
from ._defense import Defense as Defense
from ._defense import Step as Step
from ._epoch_record import EpochRecord as EpochRecord
from ._external import ExternalTrainer as ExternalTrainer
from ._predict import accuracy as accuracy
from ._predict import predict as predict
from ._recipe import Recipe as Recipe
from ._trained import Trained as Trained
from ._trainer import train as train

__all__ = [
    "Batch",
    "Defense",
    "EpochRecord",
    "ExternalTrainer",
    "Recipe",
    "Step",
    "Trained",
    "accuracy",
    "batch_bounds",
    "predict",
    "train",
]
