from ._dropping import DropJudgement as DropJudgement
from ._dropping import DroppingDefense as DroppingDefense
from ._dropping import DropReport as DropReport
from ._registry import DefenseCard as DefenseCard
from ._registry import describe as describe
from ._registry import get as get
from ._registry import names as names
from .epic import EPIC as EPIC
from .epic import isolated as isolated
from .isolation import Isolation as Isolation
from .isolation import strays as strays
from .loss_drop import LossDrop as LossDrop
from .random_drop import RandomDrop as RandomDrop

__all__ = [
    "EPIC",
    "DefenseCard",
    "DropJudgement",
    "DropReport",
    "DroppingDefense",
    "Isolation",
    "LossDrop",
    "RandomDrop",
    "describe",
    "get",
    "isolated",
    "names",
    "strays",
]
