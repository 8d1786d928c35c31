"""A graded reward between 0 and 1: form first, then nearness, and 1 only for an answer that the task's checker accepts.

A policy that starts from random weights is right about once in 10,000 answers; without grades it would learn nothing.

    reward = 0.2 * form + well_formed * (0.2 + 0.6 * nearness)

form         share of the places (characters, and the end mark) that are of the answer's alphabet, or the end mark
well_formed  1 if the answer is ended and is an integer (a word of letters for text tasks), else 0
nearness     integers: 1 / (1 + |answer - right answer|);  text: share of places with the right character
"""

from __future__ import annotations

import re
from typing import Literal, assert_never

FORM_WEIGHT, WELL_FORMED_WEIGHT, NEARNESS_WEIGHT = 0.2, 0.2, 0.6
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_WORD = re.compile(r"[a-zA-Z]+")
_ALPHABET = {
    "integer": frozenset("-0123456789"),
    "text": frozenset(map(chr, (*range(65, 91), *range(97, 123)))),
}


def grade(text: str, ended: bool, right: str, grading: Literal["integer", "text"]) -> float:
    """The reward of the answer `text`; `ended` says whether the end token closed it. 0 for an empty answer."""
    if not text:
        return 0.0
    fitting = sum(character in _ALPHABET[grading] for character in text)
    reward = FORM_WEIGHT * (fitting + ended) / (len(text) + 1)
    if ended and _pattern(grading).fullmatch(text):
        reward += WELL_FORMED_WEIGHT + NEARNESS_WEIGHT * _nearness(text, right, grading)
    return reward


def _pattern(grading: Literal["integer", "text"]) -> re.Pattern[str]:
    match grading:
        case "integer":
            return _INTEGER
        case "text":
            return _WORD
        case _:
            assert_never(grading)


def _nearness(text: str, right: str, grading: Literal["integer", "text"]) -> float:
    match grading:
        case "integer":
            return 1.0 / (1.0 + abs(int(text) - int(right)))
        case "text":
            same = sum(a == b for a, b in zip(text, right, strict=False))
            return same / max(len(text), len(right))
        case _:
            assert_never(grading)
