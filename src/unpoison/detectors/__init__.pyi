from ._detector import Detector as Detector
from ._findings import Draw as Draw
from ._findings import Findings as Findings
from ._findings import Judgement as Judgement
from ._findings import Threshold as Threshold
from ._findings import average_precision as average_precision
from ._observation import Observation as Observation
from ._registry import get as get
from ._registry import names as names
from .delta_influence import DeltaInfluence as DeltaInfluence
from .delta_influence import NullDistribution as NullDistribution
from .delta_influence import Rule as Rule
from .delta_influence import Votes as Votes
from .ekfac_threshold import EKFACThreshold as EKFACThreshold

__all__ = [
    "DeltaInfluence",
    "Detector",
    "Draw",
    "EKFACThreshold",
    "Findings",
    "Judgement",
    "NullDistribution",
    "Observation",
    "Rule",
    "Threshold",
    "Votes",
    "average_precision",
    "get",
    "names",
]
