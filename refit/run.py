"""The job: `python -m refit.run [+policy.nccl_xfer_refit=true] [--config-name NAME] [key=value ...]`.

Hydra composes the configuration; from there on it is a frozen value. Exit codes: 0 done, 1 a failure while running,
2 a configuration that cannot work, 130 interrupted. Progress goes to standard error; the last line of standard output
is the summary as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from refit.plan.errors import ConfigError, PlanError
from refit.service.config import JobConfig, apply_environment, known_keys, nearest_key, what_it_takes
from refit.transfer.errors import RefitFailed, TransportError

SHARED_CONFIGS = Path("share", "refit", "configs")  # below the environment that a wheel was installed into
FLAG = "nccl_xfer_refit"
OK, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job from a command line. Returns the exit code; prints one clear message for a failure."""
    arguments = _parser().parse_intermixed_args(sys.argv[1:] if argv is None else argv)
    with _sigterm_interrupts(), _only_summary_on_stdout() as stdout:
        try:
            config = load_config(arguments.config_name, arguments.overrides, arguments.config_dir)
            if arguments.cfg:
                print(OmegaConf.to_yaml(OmegaConf.structured(config)), file=stdout, end="")
                return OK
            summary = _run(config, sys.argv[1:] if argv is None else argv)
        except (ConfigError, PlanError) as error:
            return _say(f"refused: {error}", REFUSED if isinstance(error, ConfigError) else FAILED)
        except (RefitFailed, TransportError) as error:
            return _say(f"failed: {error}", FAILED)
        except KeyboardInterrupt:
            return _say("interrupted; everything this job started has been ended", INTERRUPTED)
        except Exception as error:
            traceback.print_exc()
            return _say(
                f"failed, by a bug or a condition nobody thought of: {type(error).__name__}: {error}", FAILED
            )
        print(json.dumps(summary), file=stdout, flush=True)
    return OK


def load_config(
    config_name: str = "default", overrides: Sequence[str] = (), config_dir: Path | None = None
) -> JobConfig:
    """Compose `config_name` with `overrides` and the environment variables. Raises ConfigError with one message."""
    folder = config_folder() if config_dir is None else config_dir.resolve()
    if not (folder / f"{config_name.removesuffix('.yaml')}.yaml").is_file():
        there = ", ".join(sorted(path.stem for path in folder.glob("*.yaml"))) or "no configuration at all"
        raise ConfigError(f"--config-name {config_name!r}: {folder} holds {there}")
    _require_known_keys(overrides)
    _register_schema()
    try:
        with initialize_config_dir(version_base=None, config_dir=str(folder)):
            composed = compose(config_name, overrides=list(overrides))
            config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_message(error)) from error
    assert isinstance(config, JobConfig), f"Hydra composed a {type(config).__name__}, not a JobConfig"
    if not isinstance(config.policy.nccl_xfer_refit, bool):
        raise ConfigError(f"policy.{FLAG} is {config.policy.nccl_xfer_refit!r}: it must be true or false")
    return apply_environment(config, os.environ)


def config_folder() -> Path:
    """`configs/` of the source tree; for an installed wheel, where it has put the same files."""
    beside = Path(__file__).resolve().parent.parent / "configs"
    return beside if beside.is_dir() else Path(sys.prefix) / SHARED_CONFIGS


def _register_schema() -> None:
    """Give Hydra the types of JobConfig, without the flag: it must be absent for `+policy.nccl_xfer_refit` to work.

    OmegaConf marks frozen dataclasses read-only, which would refuse every override; the mark is cleared.
    """
    schema = OmegaConf.structured(JobConfig)
    OmegaConf.set_readonly(schema, None)
    for section in schema.values():
        if isinstance(section, DictConfig):
            OmegaConf.set_readonly(section, None)
    with open_dict(schema.policy):
        del schema.policy[FLAG]
    ConfigStore.instance().store(name="job_schema", node=schema)


def _require_known_keys(overrides: Sequence[str]) -> None:
    """Refuse an override of a key that does not exist, with the nearest one that does."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(f"{_one_message(error)}; write key=value, +key=value or ++key=value") from error
    for override in parsed:
        key = override.key_or_group
        if override.is_delete():
            raise ConfigError(f"{override.input_line!r}: no key can be removed; set it to a value instead")
        if key not in known_keys():
            raise ConfigError(
                f"{override.input_line!r}: there is no key {key!r}; did you mean {nearest_key(key)!r}?"
            )
        if key == f"policy.{FLAG}" and not (override.is_add() or override.is_force_add()):
            raise ConfigError(
                f"{override.input_line!r}: the key is absent by default; write +{override.input_line}"
            )


def _one_message(error: BaseException) -> str:
    """Hydra's or OmegaConf's message and its cause, on one line, without their internals; and the way out."""
    lines = [line for text in (str(error), str(error.__cause__ or "")) for line in text.splitlines()]
    shown = [
        line.strip() for line in lines if line.strip() and not re.match(r"\s*(\w+_type=|See https)", line)
    ]
    message = "; ".join(line.replace("full_key: ", "key ") for line in shown)
    unknown = re.search(r"Key '([^']+)' (?:is )?not in", message)
    full_key = re.search(r"; key ([\w.]+)", message)
    if unknown is not None:
        key = full_key.group(1) if full_key is not None else unknown.group(1)
        message = f"there is no key {key!r}; did you mean {nearest_key(key)!r}? ({message})"
    elif full_key is not None and what_it_takes(full_key.group(1)):
        message += f"; {what_it_takes(full_key.group(1))}"
    return message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m refit.run", description="A GRPO job with exact weight refits."
    )
    parser.add_argument("--config-name", "-cn", default="default", help="a file of the configuration folder")
    parser.add_argument("--config-dir", "-cd", type=Path, help="another configuration folder")
    parser.add_argument("--cfg", "-c", choices=("job",), help="print the composed configuration and stop")
    parser.add_argument("overrides", nargs="*", help="key=value, +key=value or ++key=value")
    return parser


def _run(config: JobConfig, argv: Sequence[str]) -> dict[str, Any]:
    """Import what runs jobs only now: a refused command line costs no import of torch or Ray."""
    from refit.service.job import run_job

    return run_job(config, tuple(argv), sys.stderr)


@contextlib.contextmanager
def _only_summary_on_stdout() -> Iterator[TextIO]:
    """Inside, whatever is printed goes to standard error; the yielded stream is the real standard output."""
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(real, "w", closefd=False) as stream:
            yield stream
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM ends the job as Ctrl-C does, with everything it started; a second one does not cut that short."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(_signal: int, _frame: types.FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _say(message: str, code: int) -> int:
    print(f"refit: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
