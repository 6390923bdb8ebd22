from . import attacks as attacks
from . import data as data
from . import defenses as defenses
from . import detectors as detectors
from . import errors as errors
from . import evaluation as evaluation
from . import influence as influence
from . import models as models
from . import registry as registry
from . import report as report
from . import runs as runs
from . import tasks as tasks
from . import threats as threats
from . import training as training
from . import unlearners as unlearners
from ._repair import Repair as Repair
from ._repair import repair as repair
from .data import TrainingSet as TrainingSet
from .detectors import Calibration as Calibration
from .detectors import Findings as Findings
from .detectors import Observation as Observation
from .threats import Backdoor as Backdoor
from .threats import Budget as Budget
from .threats import Goal as Goal
from .threats import PoisonSet as PoisonSet
from .threats import Trigger as Trigger
from .training import Recipe as Recipe
from .training import Trained as Trained
from .workflow import Measurement as Measurement
from .workflow import calibrate as calibrate
from .workflow import craft as craft
from .workflow import heal as heal
from .workflow import measure as measure
from .workflow import observe as observe
from .workflow import scan as scan
from .workflow import trace as trace
from .workflow import train as train

__all__ = [
    "Backdoor",
    "Budget",
    "Calibration",
    "Findings",
    "Goal",
    "Measurement",
    "Observation",
    "PoisonSet",
    "Recipe",
    "Repair",
    "Trained",
    "TrainingSet",
    "Trigger",
    "attacks",
    "calibrate",
    "craft",
    "data",
    "defenses",
    "detectors",
    "errors",
    "evaluation",
    "heal",
    "influence",
    "measure",
    "models",
    "observe",
    "registry",
    "repair",
    "report",
    "runs",
    "scan",
    "tasks",
    "threats",
    "trace",
    "train",
    "training",
    "unlearners",
]
__version__: str
