from ._measure import Measurement as Measurement
from ._measure import measure as measure

__all__ = ["Measurement", "measure"]
