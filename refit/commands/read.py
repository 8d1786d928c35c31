"""`read`: rows of an HF tensor from a running engine, at their full logical shape; the engine serves on.

Without a name it says what the engine holds.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refit.commands.common import wait_seconds

if TYPE_CHECKING:
    from refit.service.reader import ReadBack, Reader

MAX_SHOWN = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "tensor",
        metavar="NAME[START:STOP]",
        nargs="?",
        default="",
        help="an HF name; one expert by its own, all by ...experts.*...; without it: all that the engine holds",
    )
    add_engine_arguments(parser)
    parser.add_argument(
        "--engine", type=int, default=0, metavar="K", help="which engine of the job (default 0)"
    )
    parser.add_argument("--version", type=int, default=None, metavar="V", help="refuse any other version")
    parser.add_argument(
        "--dequantize", action="store_true", help="what a quantized weight stands for, in float32"
    )
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FILE.safetensors", help="write the rows there, exactly"
    )
    parser.add_argument("--json", action="store_true", help="a JSON object as the last line of stdout")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Which job or server is meant."""
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="of a running job (default: the only one that runs in a folder of runs/)",
    )
    parser.add_argument(
        "--server", default="", metavar="URL", help="a vLLM server with the refit backend, in place of a job"
    )
    parser.add_argument(
        "--address",
        default="127.0.0.1",
        metavar="HOST",
        help="with --server: this machine's address that its workers answer to (default loopback)",
    )
    parser.add_argument(
        "--timeout",
        type=wait_seconds,
        default=60.0,
        metavar="S",
        help="longest wait for an answer (default 60)",
    )


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 with the cause when the engine cannot give the rows."""
    from refit.plan.read import parse_slice
    from refit.service.access import job_reader, server_reader
    from refit.transfer.errors import RefitFailed, TransportError

    name, (start, stop) = parse_slice(arguments.tensor) if arguments.tensor else ("", (None, None))
    try:
        if arguments.server:
            opened = server_reader(arguments.server, arguments.address, arguments.timeout)
        else:
            opened = job_reader(arguments.run_dir, arguments.engine, arguments.timeout)
        with opened as reader:
            if name:
                _show(_read(reader, name, slice(start, stop), arguments), arguments)
            else:
                _list(reader, arguments)
    except (RefitFailed, TransportError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _read(reader: "Reader", name: str, rows: slice, arguments: argparse.Namespace) -> "ReadBack":
    whole = rows.start is None and rows.stop is None
    return reader.read(name, None if whole else rows, arguments.version, arguments.dequantize)


def _list(reader: "Reader", arguments: argparse.Namespace) -> None:
    """Every tensor by its canonical name, and why it cannot be read where it cannot."""
    side = reader.side
    for name, spec in sorted(side.specs.items()):
        reason = f"  not readable: {side.misc[name]}" if name in side.misc else ""
        print(f"{name}  {spec.dtype} {list(spec.shape)}{reason}")
    ranks = len(side.manifest.ranks)
    print(f"{reader.engine.name}: {len(side.specs)} tensors on {ranks} ranks, {len(side.misc)} not readable")
    if arguments.json:
        held = {
            name: {"dtype": spec.dtype, "shape": list(spec.shape)}
            for name, spec in sorted(side.specs.items())
        }
        print(json.dumps({"tensors": held, "unreadable": dict(side.misc)}))


def _show(answer: "ReadBack", arguments: argparse.Namespace) -> None:
    tensor = answer.tensor
    if arguments.out is not None:
        from safetensors.torch import save_file

        save_file(
            {answer.name: tensor.contiguous()}, arguments.out, metadata={"version": str(answer.version)}
        )
    dtype, kinds = str(tensor.dtype).removeprefix("torch."), ", ".join(sorted(set(answer.kinds.values())))
    print(
        f"{arguments.tensor}: {dtype} {list(tensor.shape)}, version {answer.version}, from ranks {list(answer.ranks)} "
        f"({kinds}), {len(answer.witnesses)} others agree, {answer.moved_bytes} bytes moved"
    )
    if arguments.out is None:
        print(tensor)
    if arguments.json:
        print(json.dumps(_summary(answer)))


def _summary(answer: "ReadBack") -> dict[str, Any]:
    values = answer.tensor.double().flatten() if answer.tensor.numel() <= MAX_SHOWN else None
    return {
        "name": answer.name,
        "shape": list(answer.tensor.shape),
        "dtype": str(answer.tensor.dtype).removeprefix("torch."),
        "version": answer.version,
        "ranks": list(answer.ranks),
        "witnesses": list(answer.witnesses),
        "kinds": dict(answer.kinds),
        "moved_bytes": answer.moved_bytes,
        "values": None if values is None else [repr(value) for value in values.tolist()],
    }
