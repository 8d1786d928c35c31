"""`python -m refit COMMAND`: plan and simulate without any framework, and validate with the real ones on a CPU.

A command is a module of `refit.commands` with NAME, HELP, `add_arguments(parser)` and `run(arguments) -> int`; name it
in COMMANDS. Modules are imported when asked for, so one command's needs are never another's.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from refit.plan.errors import ConfigError, PlanError

COMMANDS = {
    "plan": ("refit.commands.plan", "plan a refit and report bytes, links, memory, seconds"),
    "explain": ("refit.commands.explain", "who sends which box of a tensor to whom"),
    "simulate": ("refit.commands.simulate", "timeline of a refit on a fabric, with stragglers and failures"),
    "validate": ("refit.commands.validate", "refit real generators from real trainers, compare every byte"),
    "doctor": (
        "refit.commands.doctor",
        "check this environment, or every node of a cluster, and say what to fix",
    ),
    "read": ("refit.commands.read", "rows of a tensor from a running engine, by HF name"),
    "diff": ("refit.commands.diff", "where trainers, engines and checkpoints differ, down to the element"),
    "report": ("refit.commands.report", "one HTML page about a run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, or 2 with a message on stderr for input that cannot work."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m refit", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name in words[:1]:
            import_module(module_name).add_arguments(command)
    arguments = parser.parse_args(words)
    module = import_module(COMMANDS[arguments.command][0])
    try:
        status: int = module.run(arguments)
    except (PlanError, ConfigError) as fault:
        print(f"{type(fault).__name__}: {fault}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    return status
