from . import attacks as attacks
from . import data as data
from . import defenses as defenses
from . import detectors as detectors
from . import errors as errors
from . import evaluation as evaluation
from . import influence as influence
from . import models as models
from . import report as report
from . import threats as threats
from . import training as training
from . import unlearners as unlearners
from .data import TrainingSet as TrainingSet
from .detectors import Findings as Findings
from .detectors import Observation as Observation

__all__ = [
    "Findings",
    "Observation",
    "TrainingSet",
    "attacks",
    "data",
    "defenses",
    "detectors",
    "errors",
    "evaluation",
    "influence",
    "models",
    "report",
    "threats",
    "training",
    "unlearners",
]
__version__: str
