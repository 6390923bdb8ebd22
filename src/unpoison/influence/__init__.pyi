from ._factors import Factors as Factors
from ._factors import LayerFactors as LayerFactors
from ._factors import fit_factors as fit_factors
from ._factors import model_fingerprint as model_fingerprint
from ._projection import Projected as Projected
from ._projection import project as project
from ._queries import AbsoluteDamping as AbsoluteDamping
from ._queries import Damping as Damping
from ._queries import PreconditionedQueries as PreconditionedQueries
from ._queries import RelativeDamping as RelativeDamping
from ._queries import precondition as precondition
from ._scores import Scores as Scores
from ._scores import score as score
from ._tracked import Coverage as Coverage
from ._tracked import coverage as coverage

__all__ = [
    "AbsoluteDamping",
    "Coverage",
    "Damping",
    "Factors",
    "LayerFactors",
    "PreconditionedQueries",
    "Projected",
    "RelativeDamping",
    "Scores",
    "coverage",
    "fit_factors",
    "model_fingerprint",
    "precondition",
    "project",
    "score",
]
