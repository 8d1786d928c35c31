"""What a validation run is made of: cases, read from small TOML files.

[[case]]
name = "dense TP2 to TP4"
model = "tiny-qwen3"                 # a tiny model, a config class of transformers, or a folder
overrides = { vocab_size = 500 }     # fields of its HF config
train = { tensor = 2 }               # fields of TrainParallel
gen = { tensor = 4 }                 # fields of GenParallel
replicas = 1                         # engines of that layout
precision = "fp32"                   # of trainers, engines and checkpoint: fp32 or bf16
quantized = ""                       # what engines store the matrices in: fp8 or mxfp8, made from bf16 by the sender
fp8_trainers = false                 # trainers store FP8 blocks too, by a test double of Transformer Engine's tensors
logprobs = false                     # also run the engines, against one of a single rank
read = false                         # also read every tensor back from the first engine, and random slices
unrunnable = ""                      # why this machine cannot run it, and what stands in for it
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from refit.gen_side.generator import GenParallel
from refit.plan import ConfigError
from refit.train_side.options import TrainParallel
from refit.transfer.precision.checkpoint import QUANTIZATIONS
from refit.transfer.precision.fp8 import FP8_BLOCK

SHIPPED = ("l0", "l1", "fp8", "read")
PRECISIONS = ("fp32", "bf16")
_FOLDER = Path(__file__).parent / "matrices"


@dataclass(frozen=True, slots=True)
class Case:
    """One layout of trainers, one of generators, and a model that goes from the one to the other."""

    name: str
    model: str
    train: TrainParallel
    gen: GenParallel
    overrides: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 1
    precision: str = "fp32"
    quantized: str = ""
    fp8_trainers: bool = False
    logprobs: bool = False
    read: bool = False
    misc: tuple[str, ...] = ()
    min_bulk_share: float = 0.99
    unrunnable: str = ""

    def __post_init__(self) -> None:
        if not self.name or not self.model:
            raise ConfigError(f"a case needs a name and a model; got {self.name!r} and {self.model!r}")
        if self.replicas < 1:
            raise ConfigError(f"case {self.name!r}: replicas is {self.replicas}; at least 1 is needed")
        if self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise ConfigError(f"case {self.name!r}: precision {self.precision!r} is not one of {known}")
        if self.quantized and (self.quantized not in QUANTIZATIONS or self.precision != "bf16"):
            raise ConfigError(
                f"case {self.name!r}: quantized is {self.quantized!r} with precision {self.precision!r}; "
                f"{' and '.join(QUANTIZATIONS)} are made from bf16"
            )
        if self.fp8_trainers and self.quantized != FP8_BLOCK.name:
            raise ConfigError(
                f"case {self.name!r}: fp8_trainers with quantized {self.quantized!r}; FP8 blocks go to fp8"
            )

    @property
    def num_train(self) -> int:
        return self.train.world_size

    @property
    def num_gen(self) -> int:
        return self.replicas * self.gen.num_ranks

    @property
    def layout(self) -> str:
        """Both layouts in short, for example "TP2 PP2 > 2 x TP2 EP"."""
        engines = f"{self.replicas} x " if self.replicas > 1 else ""
        return f"{_short(self.train)} > {engines}{_short(self.gen)}"


def load_matrix(name: str) -> tuple[Case, ...]:
    """The cases of a shipped matrix or of a file. Raises ConfigError that names the file and the case."""
    path = _FOLDER / f"{name}.toml" if name in SHIPPED else Path(name)
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"no matrix {name!r}: give {', '.join(SHIPPED)} or a TOML file ({error})"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    unknown = sorted(set(document) - {"case"})
    if unknown or not document.get("case"):
        raise ConfigError(f"{path}: expected [[case]] tables only, found {unknown or 'none'}")
    cases = tuple(_case(path, position, table) for position, table in enumerate(document["case"]))
    names = [case.name for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{path}: two cases are called {twice[0]!r}")
    return cases


def choose(cases: Sequence[Case], names: Sequence[str]) -> tuple[Case, ...]:
    """The named cases in matrix order, or all. Raises ConfigError for a name that is not there."""
    known = [case.name for case in cases]
    unknown = [name for name in names if name not in known]
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"no case {unknown[0]!r} among the {len(known)} of this matrix; did you mean {nearest!r}? --list names all"
        )
    return tuple(case for case in cases if not names or case.name in names)


def _case(path: Path, position: int, table: Mapping[str, Any]) -> Case:
    name = table.get("name", f"number {position}")
    unknown = sorted(set(table) - {each.name for each in fields(Case)})
    if unknown:
        raise ConfigError(f"{path}, case {name!r}: unknown key {unknown[0]!r}")
    try:
        sides = {
            "train": TrainParallel(**table.get("train", {})),
            "gen": GenParallel(**table.get("gen", {})),
        }
        return Case(**{**table, **sides, "misc": tuple(table.get("misc", ()))})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}, case {name!r}: {error}") from error


_LETTERS = {
    "tensor": "TP",
    "pipeline": "PP",
    "virtual_pipeline": "VPP",
    "expert": "EP",
    "expert_tensor": "ETP",
    "gtp": "GTP",
    "expert_gtp": "EGTP",
    "data": "DP",
    "first_stage_layers": "first",
    "last_stage_layers": "last",
}


def _short(parallel: TrainParallel | GenParallel) -> str:
    words = []
    for name, letters in _LETTERS.items():
        size = getattr(parallel, name, None)  # the two sides have different axes
        if size is True:
            words.append(letters)
        elif size not in (None, False, 1) or (size == 1 and name.endswith("layers")):
            words.append(f"{letters}{size}")
    return " ".join(words) or "1"
