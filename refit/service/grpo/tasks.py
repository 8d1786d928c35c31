"""Tasks with checkable answers, from reasoning-gym's procedural generators, and the text form models see.

A task is an endless, seeded list of problems: problem i is the same in every run with the same seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

from refit.plan.errors import ConfigError

NUM_BYTE_TOKENS = 256
VIRTUAL_SIZE = 2**31
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class TaskKind:
    """One reasoning-gym generator, its settings, and how near misses are graded (see `reward`)."""

    generator: str
    grading: Literal["integer", "text"]
    settings: Mapping[str, Any]


_SMALL_SUMS: Mapping[str, Any] = MappingProxyType(
    {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
)
TASKS: Mapping[str, TaskKind] = MappingProxyType(
    {
        "basic_arithmetic": TaskKind(
            "basic_arithmetic",
            "integer",
            MappingProxyType({**_SMALL_SUMS, "operators": ("+", "-"), "allow_parentheses": False}),
        ),
        "chain_sum": TaskKind("chain_sum", "integer", _SMALL_SUMS),
        "count_bits": TaskKind("count_bits", "integer", MappingProxyType({"min_n": 1, "max_n": 255})),
        "spell_backward": TaskKind(
            "spell_backward", "text", MappingProxyType({"min_word_len": 3, "max_word_len": 4})
        ),
    }
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One question and the answer that reasoning-gym holds for right."""

    question: str
    answer: str
    index: int


class Task:
    """A seeded list of problems. Opening imports reasoning-gym (4 to 12 s)."""

    def __init__(self, kind: TaskKind, generator: Any) -> None:
        self.kind = kind
        self._generator = generator

    @classmethod
    def open(cls, name: str, seed: int) -> Task:
        """Raises ConfigError for a name that is not in TASKS."""
        if name not in TASKS:
            raise ConfigError(f"grpo.task is {name!r}: it must be one of {', '.join(TASKS)}")
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", SyntaxWarning
            )  # of a dependency of reasoning-gym, at its first import
            import reasoning_gym
        kind = TASKS[name]
        generator = reasoning_gym.create_dataset(
            kind.generator, seed=seed, size=VIRTUAL_SIZE, **kind.settings
        )
        return cls(kind, generator)

    def problems(self, step: int, count: int) -> tuple[Problem, ...]:
        """The `count` problems of a step; no two steps share one."""
        first = step * count
        return tuple(self._problem(index) for index in range(first, first + count))

    def verify(self, text: str, problem: Problem) -> bool:
        """Whether reasoning-gym's own checker accepts the answer in full."""
        return float(self._generator.score_answer(text, self._generator[problem.index])) == 1.0

    def _problem(self, index: int) -> Problem:
        entry = self._generator[index]
        return Problem(str(entry["question"]), str(entry["answer"]), index)


class Codec(Protocol):
    """Text to token ids and back. `end_token` closes an answer and is not part of its text."""

    @property
    def end_token(self) -> int: ...

    def encode(self, text: str) -> tuple[int, ...]: ...

    def decode(self, tokens: tuple[int, ...]) -> str: ...


@dataclass(frozen=True, slots=True)
class ByteCodec:
    """One token per byte, as in the tiny models. Tokens that are no byte decode to U+FFFD."""

    end_token: int

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def decode(self, tokens: tuple[int, ...]) -> str:
        """One character per token, so that a share of characters is a share of tokens."""
        return "".join(chr(token) if token < NUM_BYTE_TOKENS else "\ufffd" for token in tokens)


@dataclass(frozen=True, slots=True)
class TokenizerCodec:
    """The tokenizer saved with the model."""

    end_token: int
    tokenizer: Any

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(int(token) for token in self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: tuple[int, ...]) -> str:
        return str(self.tokenizer.decode(list(tokens)))


def has_tokenizer(model_dir: str | Path) -> bool:
    """Whether a tokenizer was saved with the model; else its tokens are taken for bytes."""
    return any((Path(model_dir) / name).exists() for name in TOKENIZER_FILES)


def open_codec(model_dir: str | Path, model_config: Mapping[str, Any]) -> Codec:
    """The tokenizer in `model_dir`, or bytes where there is none. Raises ConfigError without an end token."""
    end_token = model_config.get("eos_token_id")
    end_token = end_token[0] if isinstance(end_token, list) and end_token else end_token
    if not isinstance(end_token, int):
        raise ConfigError(
            f"policy.model: {model_dir}/config.json has eos_token_id {end_token!r}: it must be a number"
        )
    if not has_tokenizer(model_dir):
        return ByteCodec(end_token)
    from transformers import AutoTokenizer

    return TokenizerCodec(end_token, AutoTokenizer.from_pretrained(model_dir))
