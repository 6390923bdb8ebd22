from ._attack import Attack as Attack
from ._registry import AttackCard as AttackCard
from ._registry import describe as describe
from ._registry import get as get
from ._registry import names as names
from .badnets import BadNets as BadNets

__all__ = ["Attack", "AttackCard", "BadNets", "describe", "get", "names"]
