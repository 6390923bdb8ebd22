from ._examples import Examples as Examples
from ._examples import TensorExamples as TensorExamples
from ._training_set import TrainingSet as TrainingSet

__all__ = ["Examples", "TensorExamples", "TrainingSet"]
