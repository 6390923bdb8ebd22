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
from ._api import heal as heal
from ._api import scan as scan
from ._api import trace as trace
from .data import TrainingSet as TrainingSet
from .detectors import Findings as Findings
from .detectors import Observation as Observation
from .evaluation import measure as measure
from .threats import Backdoor as Backdoor
from .threats import Budget as Budget
from .threats import Goal as Goal
from .threats import PoisonSet as PoisonSet
from .threats import Trigger as Trigger
from .training import Recipe as Recipe
from .training import Trained as Trained
from .training import train as train

__all__ = [
    "Backdoor",
    "Budget",
    "Findings",
    "Goal",
    "Observation",
    "PoisonSet",
    "Recipe",
    "Trained",
    "TrainingSet",
    "Trigger",
    "attacks",
    "data",
    "defenses",
    "detectors",
    "errors",
    "evaluation",
    "heal",
    "influence",
    "measure",
    "models",
    "report",
    "scan",
    "threats",
    "trace",
    "train",
    "training",
    "unlearners",
]
__version__: str
