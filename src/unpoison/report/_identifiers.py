"""Identifiers of data poisoning in the taxonomies that security teams file tickets by.

Names are those of MITRE ATLAS v2026.07, of the OWASP Machine Learning Security Top 10 (2023) and of the OWASP
Top 10 for LLM Applications (2025). What unpoison finds is evidence in training data, so a finding has the
identifiers of poisoned data; where it was traced from the answer of a model, those of a poisoned model, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final


@final
@dataclass(frozen=True)
class Identifier:
    """One entry of a taxonomy.

    Arguments:
        taxonomy: its name.
        version: of the taxonomy.
        organization: which publishes it.
        id: of the entry.
        name: of the entry.
        uri: of its page.
        of_model: whether it is about a poisoned model, and not about poisoned data alone.
    """

    taxonomy: str
    version: str
    organization: str
    id: str
    name: str
    uri: str
    of_model: bool = False


_ATLAS = ("MITRE ATLAS", "2026.07", "MITRE")
_OWASP_ML = ("OWASP Machine Learning Security Top 10", "2023", "OWASP")
_OWASP_LLM = ("OWASP Top 10 for LLM Applications", "2025", "OWASP")
_OWASP_ML_PAGES = "https://owasp.org/www-project-machine-learning-security-top-10/docs/"

IDENTIFIERS: Final = (
    Identifier(
        *_ATLAS, "AML.T0020", "Training Data Poisoning", "https://atlas.mitre.org/techniques/AML.T0020"
    ),
    Identifier(
        *_ATLAS, "AML.T0018", "Manipulate AI Model", "https://atlas.mitre.org/techniques/AML.T0018", True
    ),
    Identifier(
        *_OWASP_ML, "ML02:2023", "Data Poisoning Attack", _OWASP_ML_PAGES + "ML02_2023-Data_Poisoning_Attack"
    ),
    Identifier(
        *_OWASP_ML, "ML10:2023", "Model Poisoning", _OWASP_ML_PAGES + "ML10_2023-Model_Poisoning", True
    ),
    Identifier(
        *_OWASP_LLM,
        "LLM04:2025",
        "Data and Model Poisoning",
        "https://genai.owasp.org/llmrisk/llm042025-data-and-model-poisoning/",
    ),
)


def identifiers_of(*, traced: bool) -> tuple[Identifier, ...]:
    """What findings are evidence of; a poisoned model only where an answer of it was traced.

    They are the same whether poison was found or not, as they say what was looked for.
    """
    return tuple(one for one in IDENTIFIERS if traced or not one.of_model)
