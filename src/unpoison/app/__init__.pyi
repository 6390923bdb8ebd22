from ._case import Case as Case
from ._serve import Listening as Listening
from ._serve import listen as listen
from ._serve import serve as serve
from ._shown import Named as Named
