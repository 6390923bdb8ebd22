from ._case import Case as Case
from ._serve import serve as serve
