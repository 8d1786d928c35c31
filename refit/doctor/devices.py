"""GPUs, their driver, torch's view of them, and NCCL. Asks in other processes, with deadlines: a sick driver hangs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence

from refit.doctor.check import Check, Host
from refit.doctor.versions import numbers, version_of

AREA = "GPUs"
MIN_NCCL = (2, 30, 5)
"""For xferdtensor(backend="m2n"): as in refit/transfer/m2n.py, which this cannot import."""
NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
SMI_TIMEOUT_S, TORCH_TIMEOUT_S = 60.0, 120.0
ASK_TORCH = (
    "import json, torch; print(json.dumps({'devices': torch.cuda.device_count(), 'cuda': torch.version.cuda, "
    "'nccl': list(torch.cuda.nccl.version()) if torch.version.cuda else []}))"
)


def gpus(host: Host) -> list[Check]:
    """Without a driver there is one line. With one: the devices, whether torch sees as many, and NCCL."""
    if not host.path("/dev/nvidiactl").exists() and shutil.which("nvidia-smi") is None:
        found = "none: trainers and engines run on the CPU, over gloo"
        return [Check(AREA, "driver", "ok", found), nccl_of_packages()]
    code, said = ask(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], SMI_TIMEOUT_S
    )
    if code != 0:
        advice = "see dmesg and nvidia-smi; in a container, is the NVIDIA runtime on (docker run --gpus all)?"
        return [Check(AREA, "driver", "fail", f"nvidia-smi: {said[-200:]}", advice)]
    names = [line.strip() for line in said.splitlines() if line.strip()]
    listed = Check(AREA, "driver", "ok", f"{len(names)}: {', '.join(dict.fromkeys(names))}")
    return [listed, *_torch(len(names), host.environ.get("CUDA_VISIBLE_DEVICES"))]


def _torch(num_listed: int, visible: str | None) -> list[Check]:
    code, said = ask([sys.executable, "-c", ASK_TORCH], TORCH_TIMEOUT_S)
    if code != 0:
        return [
            Check(AREA, "torch", "fail", said[-200:], "import torch must work: pip install 'refit[cuda]'")
        ]
    answer = json.loads(said.splitlines()[-1])
    return of_torch(num_listed, visible, int(answer["devices"]), answer["cuda"], tuple(answer["nccl"]))


def of_torch(
    num_listed: int, visible: str | None, num_seen: int, cuda: str | None, nccl: tuple[int, ...]
) -> list[Check]:
    """What torch answered, judged. `visible`: CUDA_VISIBLE_DEVICES; `cuda` None: a CPU build."""
    if cuda is None:
        advice = "pip install 'refit[cuda]': this torch is a CPU build; jobs run on the CPU"
        return [Check(AREA, "torch", "warn", f"built without CUDA beside {num_listed} GPUs", advice)]
    wanted = num_listed if visible is None else len([name for name in visible.split(",") if name.strip()])
    found = f"sees {num_seen} of {num_listed} GPUs, CUDA {cuda}"
    if num_seen < min(wanted, num_listed) or num_seen == 0:
        advice = "CUDA_VISIBLE_DEVICES, the driver's age for this CUDA, or a device in error (nvidia-smi -q)"
        return [Check(AREA, "torch", "fail", found, advice), nccl_version(nccl, in_use=True)]
    return [Check(AREA, "torch", "ok", found), nccl_version(nccl, in_use=True)]


def nccl_of_packages() -> Check:
    """The NCCL that torch would load, by the package that brings it."""
    versions = [found for name in NCCL_PACKAGES if (found := version_of(name)) is not None]
    return nccl_version(numbers(versions[0]) if versions else (), in_use=False)


def nccl_version(found: Sequence[int], in_use: bool) -> Check:
    """M2N alone asks for more than torch brings."""
    needed = ".".join(map(str, MIN_NCCL))
    if not found:
        return Check(
            AREA, "NCCL", "ok", "not installed", f"on GPUs xferdtensor(backend='m2n') needs {needed}"
        )
    shown = ".".join(map(str, found))
    if tuple(found) >= MIN_NCCL:
        return Check(AREA, "NCCL", "ok", shown)
    advice = f"xferdtensor(backend='m2n') alone needs {needed}: pip install --upgrade {NCCL_PACKAGES[0]}"
    return Check(AREA, "NCCL", "warn" if in_use else "ok", shown, advice)


def ask(command: Sequence[str], timeout_s: float) -> tuple[int, str]:
    """(exit code, what it said); -1 where it could not start or did not end."""
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=timeout_s)  # noqa: S603
    except subprocess.TimeoutExpired:
        return -1, f"no answer within {timeout_s:.0f} s"
    except OSError as error:
        return -1, str(error)
    return done.returncode, (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip()
