"""Finds the type of a CLEVR question from its text, for data without programs (TFDS and the Hub's copy)."""

import re

_ATTRIBUTES = ("size", "color", "material", "shape")
_WORD = "(size|color|material|shape)"

QUESTION_FAMILIES = (
    "exist",
    "count",
    "equal_integer",
    "less_than",
    "greater_than",
    *(f"query_{name}" for name in _ATTRIBUTES),
    *(f"equal_{name}" for name in _ATTRIBUTES),
)
OTHER = "other"

# Tried in order on the lower-case text; of "There is a ball; is it ...?" only the part after the semicolon is matched.
# A family that ends in an underscore is completed by the attribute that the pattern captures.
_RULES = tuple(
    (re.compile(pattern), family)
    for pattern, family in (
        (r"(how many|what number of) ", "count"),
        (r"are there (an equal|the same) number of |is the number of .* the same as the number of ", "equal_integer"),
        (r"are there (fewer|less) |is the number of .* (fewer|less) than ", "less_than"),
        (r"are there more |is the number of .* (greater|more) than ", "greater_than"),
        (r"(are there|is there|are any) ", "exist"),
        (r"how big ", "query_size"),
        (rf"what (?:is (?:the|its) )?{_WORD}\b", "query_"),
        (r"what (.* )?made of\?", "query_material"),
        (rf"the .* what {_WORD}\?", "query_"),
        (rf"is (?:the|its) {_WORD} .*the same as ", "equal_"),
        (rf"(?:is|are|do|does) .*\bsame {_WORD}\b", "equal_"),
    )
)


def question_family(question: str) -> str:
    """Returns one of `QUESTION_FAMILIES`, the last function of the question's program; `OTHER` if no pattern matches.

    Covers the wording of CLEVR v1.0 (Johnson et al. 2017) and of `synthetic_clevr.questions`.
    """
    clause = question.lower().rpartition(";")[2].strip()
    for pattern, family in _RULES:
        if match := pattern.match(clause):
            return family + match[1] if family.endswith("_") else family
    return OTHER
