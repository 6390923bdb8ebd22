from ._registry import DefenseCard as DefenseCard
from ._registry import describe as describe
from ._registry import get as get
from ._registry import names as names

__all__ = ["DefenseCard", "describe", "get", "names"]
