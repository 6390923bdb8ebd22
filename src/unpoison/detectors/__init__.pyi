from ._answers import answers_of as answers_of
from ._answers import answers_to as answers_to
from ._calibration import Calibration as Calibration
from ._cause import Cause as Cause
from ._detector import Detector as Detector
from ._findings import Draw as Draw
from ._findings import Findings as Findings
from ._findings import Judgement as Judgement
from ._findings import Threshold as Threshold
from ._findings import average_precision as average_precision
from ._methods import METHODS as METHODS
from ._methods import describe as describe
from ._methods import get as get
from ._methods import names as names
from ._methods import register as register
from ._observation import Observation as Observation
from ._observation import check_observation as check_observation
from ._observation import joined_observations as joined_observations
from ._search import Search as Search
from ._search import Searcher as Searcher
from ._transforms import similar_copies as similar_copies
from .activation_clustering import ActivationClustering as ActivationClustering
from .artifact_mixture import ArtifactMixture as ArtifactMixture
from .calibrated import Calibrated as Calibrated
from .deep_knn import DeepKNN as DeepKNN
from .delta_influence import DeltaInfluence as DeltaInfluence
from .ekfac_threshold import EKFACThreshold as EKFACThreshold
from .frequency import Frequency as Frequency
from .frequency import FrequencyClassifier as FrequencyClassifier
from .spectral_signatures import SpectralSignatures as SpectralSignatures
from .spectre import Spectre as Spectre
from .statistical_contamination import StatisticalContamination as StatisticalContamination
from .trak import TRAK as TRAK

__all__ = [
    "METHODS",
    "TRAK",
    "ActivationClustering",
    "ArtifactMixture",
    "Calibrated",
    "Calibration",
    "Cause",
    "DeepKNN",
    "DeltaInfluence",
    "Detector",
    "Draw",
    "EKFACThreshold",
    "Findings",
    "Frequency",
    "FrequencyClassifier",
    "Judgement",
    "Observation",
    "Search",
    "Searcher",
    "SpectralSignatures",
    "Spectre",
    "StatisticalContamination",
    "Threshold",
    "answers_of",
    "answers_to",
    "average_precision",
    "check_observation",
    "describe",
    "get",
    "joined_observations",
    "names",
    "register",
    "similar_copies",
]
