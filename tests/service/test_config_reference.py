"""docs/config.md is what refit/service/config.py says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from refit.service.config import JobConfig, known_keys

PAGE = Path(__file__).resolve().parents[2] / "docs" / "config.md"
ROW = re.compile(r"\| `([\w.]+)` \| `([^`]+)` \| `([^`]*)` \| (.+) \|")


def schema() -> dict[str, tuple[str, str]]:
    """{key: (type, default)} as the page writes them."""
    found = {}
    for section in dataclasses.fields(JobConfig):
        if not dataclasses.is_dataclass(section.default_factory):
            found[section.name] = section
            continue
        for key in dataclasses.fields(section.default_factory):
            found[f"{section.name}.{key.name}"] = key
    return {
        name: (str(key.type).replace(" | ", " or "), repr(default_of(key))) for name, key in found.items()
    }


def default_of(key: dataclasses.Field[object]) -> object:
    return key.default if key.default is not dataclasses.MISSING else key.default_factory()


def test_the_reference_lists_every_key_with_its_type_and_default_and_no_other() -> None:
    page = {row[1]: (row[2], row[3]) for row in ROW.finditer(PAGE.read_text())}
    wanted = schema()
    assert set(wanted) == {key for key in known_keys() if "." in key or key == "run_dir"}
    missing = [
        f"| `{key}` | `{t}` | `{d}` | ... |" for key, (t, d) in wanted.items() if page.get(key) != (t, d)
    ]
    assert not missing, "put these rows into docs/config.md:\n" + "\n".join(missing)
    assert set(page) == set(wanted), f"unknown keys in docs/config.md: {sorted(set(page) - set(wanted))}"


def test_every_environment_variable_that_configures_a_job_is_in_the_reference() -> None:
    from refit.transfer import forced

    names = [value for name, value in vars(forced).items() if name.endswith("_VARIABLE")]
    assert names
    assert all(f"`{name}`" in PAGE.read_text() for name in names)
