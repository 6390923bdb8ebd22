from ._detector import Detector as Detector
from ._findings import Draw as Draw
from ._findings import Findings as Findings
from ._findings import Judgement as Judgement
from ._findings import Threshold as Threshold
from ._findings import average_precision as average_precision
from ._observation import Observation as Observation

__all__ = ["Detector", "Draw", "Findings", "Judgement", "Observation", "Threshold", "average_precision"]
