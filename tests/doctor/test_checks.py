"""Single checks of the doctor, on machines that are made of files."""

from __future__ import annotations

import mmap
import os
import resource
import sys
import time
from pathlib import Path

import pytest

from refit.doctor import devices, leftovers, machine, network, settings, versions
from refit.doctor.check import GB, MIB, Check, Host
from refit.doctor.examine import Wishes, examine
from refit.transfer import m2n

PROCESSORS = {
    "avx2": ("ok", "AVX2 kernels"),
    "avx2 avx512f": ("ok", "AVX-512 kernels without bf16"),
    "avx2 avx512f avx512_bf16": ("ok", "without AMX"),
    "sse4_2": ("fail", "needs AVX2"),
}


def machine_of(tmp_path: Path, **files: str) -> Host:
    """A host whose files are these: `proc__meminfo="..."` is /proc/meminfo."""
    for name, text in files.items():
        path = tmp_path / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Host(tmp_path, {})


@pytest.mark.parametrize("flags", PROCESSORS)
def test_a_processor_is_told_by_the_kernels_that_it_allows(flags: str, tmp_path: Path) -> None:
    check = machine.processor(machine_of(tmp_path, proc__cpuinfo=f"processor : 0\nflags\t\t: fpu {flags}\n"))
    state, words = PROCESSORS[flags]
    assert check.state == state
    assert words in check.advice


def test_a_processor_with_everything_needs_no_words(tmp_path: Path) -> None:
    flags = "flags : avx2 avx512f avx512_bf16 amx_tile\n"
    assert machine.processor(machine_of(tmp_path, proc__cpuinfo=flags)).advice == ""


def test_the_limit_of_a_container_counts_where_it_leaves_less(tmp_path: Path) -> None:
    host = machine_of(tmp_path, proc__meminfo="MemTotal: 99 kB\nMemAvailable: 20000000 kB\n")
    assert machine.memory(host, 8 * GB).state == "ok"
    files = {"memory.max": str(22 * GB), "memory.current": str(17 * GB)}
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "sys/fs/cgroup" / name).write_text(text + "\n")
    check = machine.memory(host, 8 * GB)
    assert (check.state, check.found) == ("warn", "5.0 GB free in this container")
    (tmp_path / "sys/fs/cgroup" / "memory.max").write_text("max\n")
    assert machine.memory(host, 8 * GB).found == "20.5 GB free on this machine"


@pytest.mark.parametrize(("free_mib", "state"), [(64, "fail"), (400, "warn"), (2000, "ok")])
def test_shared_memory_is_measured_against_what_ray_and_vllm_take(
    free_mib: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dev/shm").mkdir(parents=True)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: _usage(free_mib * MIB))
    assert machine.shared_memory(Host(tmp_path, {})).state == state


def test_no_shared_memory_at_all_fails(tmp_path: Path) -> None:
    assert machine.shared_memory(Host(tmp_path, {})).state == "fail"


def _usage(free: int) -> object:
    return type("Usage", (), {"free": free, "total": 2 * free, "used": free})()


@pytest.mark.parametrize(
    ("limits", "state"),
    [
        ((256, 512), "fail"),
        ((1024, 4096), "warn"),
        ((1024, 65536), "ok"),
        ((1024, resource.RLIM_INFINITY), "ok"),
    ],
)
def test_the_hard_limit_of_open_files_counts(limits: tuple[int, int], state: str) -> None:
    assert machine.open_files(limits).state == state


def test_a_card_for_rdma_wants_memory_that_may_be_locked(tmp_path: Path) -> None:
    host = Host(tmp_path, {})
    assert machine.locked_memory(host, (65536, 65536)) == []
    (tmp_path / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
    assert machine.locked_memory(host, (65536, 65536))[0].state == "warn"
    assert machine.locked_memory(host, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))[0].state == "ok"


def test_a_name_that_does_not_resolve_is_worse_on_a_cluster() -> None:
    name = "no-such-host.invalid"
    assert network.own_name(False, name).state == "warn"
    assert network.own_name(True, name).state == "fail"
    assert network.own_name(False, "localhost").state == "ok"
    assert network.own_name(True, "localhost").state == "warn"


def test_the_range_of_ports_must_be_wide_free_and_apart_from_the_scripts(tmp_path: Path) -> None:
    key = "proc__sys__net__ipv4__ip_local_port_range"
    assert network.ephemeral_ports(machine_of(tmp_path, **{key: "32768\t60999\n"}))[0].state == "ok"
    assert "REFIT_BASE_PORT" in network.ephemeral_ports(machine_of(tmp_path, **{key: "1024 60999"}))[0].advice
    assert network.ephemeral_ports(machine_of(tmp_path, **{key: "40000 41000"}))[0].state == "warn"
    line = "  0: 0100007F:{port:04X} 00000000:0000 0A 0 0\n"
    table = "sl\n" + "".join(line.format(port=port) for port in range(40000, 40996))
    (narrow,) = network.ephemeral_ports(machine_of(tmp_path, **{key: "40000 41000", "proc__net__tcp": table}))
    assert (narrow.state, narrow.found) == ("fail", "40000 to 41000, 5 free")


@pytest.mark.parametrize(
    ("name", "value", "check", "state"),
    [
        ("NCCL_SOCKET_IFNAME", "nosuch0", "NCCL_SOCKET_IFNAME", "fail"),
        ("NCCL_SOCKET_IFNAME", "=l", "NCCL_SOCKET_IFNAME", "fail"),
        ("NCCL_SOCKET_IFNAME", "l", "NCCL_SOCKET_IFNAME", "ok"),
        ("GLOO_SOCKET_IFNAME", "l", "GLOO_SOCKET_IFNAME", "fail"),
        ("GLOO_SOCKET_IFNAME", "lo", "GLOO_SOCKET_IFNAME", "ok"),
        ("UCX_NET_DEVICES", "nosuch0", "UCX_NET_DEVICES", "fail"),
        ("VLLM_PLUGINS", "other", "VLLM_PLUGINS", "fail"),
        ("RAY_AUTH_TOKEN_PATH", "/no/such/token", "RAY_AUTH_TOKEN_PATH", "fail"),
        ("RAY_AUTH_TOKEN", "0123", "RAY_AUTH_TOKEN", "warn"),
        ("RAY_AUTH_MODE", "disabled", "RAY_AUTH_MODE", "warn"),
        ("NRL_REFIT_NUM_STREAMS", "many", "NRL_REFIT_NUM_STREAMS", "fail"),
        ("NRL_XFERDTENSOR_GOLDEN", "1", "NRL_XFERDTENSOR_GOLDEN", "warn"),
        ("NCCL_DEBUG", "INFO", "NCCL_DEBUG", "warn"),
        ("NCCL_P2P_DISABLE", "1", "NCCL_P2P_DISABLE", "warn"),
        ("http_proxy", "http://10.0.0.1:3128", "http_proxy", "warn"),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF", "warn"),
        ("PYTORCH_ALLOC_CONF", "a:1, expandable_segments: true", "PYTORCH_ALLOC_CONF", "warn"),
    ],
)
def test_a_setting_that_breaks_or_slows_a_job_is_named(name: str, value: str, check: str, state: str) -> None:
    checks = {found.name: found for found in settings.settings(Host(environ={name: value}), on_cluster=False)}
    assert checks[check].state == state
    assert "0123" not in checks[check].found


def test_a_clean_environment_gets_one_line_that_says_so() -> None:
    (check,) = settings.settings(Host(environ={}), on_cluster=False)
    assert check.state == "ok"


def test_an_explicit_cluster_wants_the_token_to_be_turned_on() -> None:
    (check,) = settings.settings(Host(environ={}), on_cluster=True)
    assert (check.name, check.state) == ("RAY_AUTH_MODE", "warn")
    assert settings.settings(Host(environ={"RAY_AUTH_MODE": "token"}), on_cluster=True)[0].state == "ok"


def test_a_folder_whose_sockets_would_have_too_long_names_fails() -> None:
    assert machine.socket_paths(Host(environ={"RAY_TMPDIR": "/tmp/" + "x" * 60})).state == "fail"
    assert machine.socket_paths(Host(environ={})).state == "ok"


def test_torch_that_sees_fewer_gpus_than_the_driver_fails() -> None:
    states = lambda *words: [check.state for check in devices.of_torch(*words)]  # noqa: E731
    assert states(8, None, 8, "13.0", (2, 30, 5)) == ["ok", "ok"]
    assert states(8, None, 8, "13.0", (2, 29, 7)) == ["ok", "warn"]
    assert states(8, None, 6, "13.0", (2, 30, 5))[0] == "fail"
    assert states(8, "0,1", 2, "13.0", (2, 30, 5))[0] == "ok"
    assert states(8, "", 0, "13.0", (2, 30, 5))[0] == "fail"
    assert states(8, None, 0, None, ()) == ["warn"]


def test_a_driver_that_fails_or_hangs_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'NVML: Driver/library version mismatch'; exit 18\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    (check,) = devices.gpus(Host(tmp_path, {}))
    assert check.state == "fail"
    assert "version mismatch" in check.found
    fake.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(devices, "SMI_TIMEOUT_S", 0.2)
    assert "no answer" in devices.gpus(Host(tmp_path, {}))[0].found


def test_the_least_nccl_is_the_one_that_m2n_asks_for() -> None:
    assert devices.MIN_NCCL == m2n.MIN_NCCL


def test_shared_memory_that_nobody_maps_is_named_and_what_is_mapped_is_not() -> None:
    path = Path("/dev/shm") / f"cuda.shm.0.refit_test.{os.getpid()}"  # the first by name, so that it is shown
    path.write_bytes(bytes(8192))
    try:
        assert str(path) not in leftovers.shared_memory(Host()).advice, "it is too young"
        os.utime(path, (time.time() - 3600,) * 2)
        assert str(path) in leftovers.shared_memory(Host()).advice
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0):
            assert str(path) not in leftovers.shared_memory(Host()).advice
    finally:
        path.unlink()


def test_the_command_that_removes_shared_memory_names_every_segment_up_to_a_length_that_is_said(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "dev" / "shm"
    folder.mkdir(parents=True)
    paths = [folder / f"psm_{number:03}" for number in range(leftovers.MAX_SEGMENTS + 2)]
    for path in paths:
        path.touch()
        os.utime(path, (time.time() - 3600,) * 2)
    advice = leftovers.shared_memory(Host(tmp_path, {})).advice
    assert all(str(path) in advice for path in paths[:-2]) and str(paths[-1]) not in advice
    assert advice.endswith("(and 2 more: run doctor again then)")
    for path in paths[10:]:
        path.unlink()
    advice = leftovers.shared_memory(Host(tmp_path, {})).advice
    assert advice == f"no process maps them: rm {' '.join(map(str, paths[:10]))}"


def test_what_vllms_collectives_leave_is_named_so_that_a_shell_takes_the_name_as_it_is() -> None:
    path = Path("/dev/shm") / f"0{os.getpid()}-tp:0-[0-1]-cpushm_1"  # named after a port; the first by name
    path.write_bytes(bytes(8192))
    try:
        os.utime(path, (time.time() - 3600,) * 2)
        assert f"'{path}'" in leftovers.shared_memory(Host()).advice
    finally:
        path.unlink()


def test_processes_of_a_job_are_told_by_their_command_and_age(tmp_path: Path) -> None:
    commands = {
        "11": "ray::TrainActor.build",
        "12": "/usr/lib/ray/raylet --store",
        "13": "VLLM::Worker_TP1",
        "14": "/venv/bin/python -m refit.run +policy.nccl_xfer_refit=true",
        "15": "vim refit.run",
        "16": "bash wrapper python -m refit.run",
    }
    ticks = os.sysconf("SC_CLK_TCK")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "uptime").write_text("1000.0 1.0\n")
    for pid, command in commands.items():
        age_s = 10 if pid == "13" else 600
        folder = tmp_path / "proc" / pid
        folder.mkdir()
        words = ["S", *["0"] * 18, str((1000 - age_s) * ticks), "0"]
        (folder / "stat").write_text(f"{pid} (a b) c) {' '.join(words)}\n")
        (folder / "cmdline").write_bytes(command.replace(" ", "\0").encode())
    check = leftovers.processes(Host(tmp_path, {}))
    assert check.state == "warn"
    assert [pid for pid in commands if f"{pid} (" in check.found] == ["11", "12", "14"]


def test_a_check_that_breaks_is_reported_beside_the_others(tmp_path: Path) -> None:
    host = machine_of(tmp_path, proc__sys__net__ipv4__ip_local_port_range="not numbers")
    checks = {check.name: check for check in examine(host, Wishes(tmp_path, 0))}
    broken = checks["ports that Linux gives out"]
    assert broken.state == "warn"
    assert "ValueError" in broken.found
    assert "localhost" in checks


def test_a_finding_without_advice_cannot_be_made() -> None:
    with pytest.raises(AssertionError, match="without saying what to do"):
        Check("a", "b", "fail", "broken")


@pytest.mark.parametrize(
    ("line", "installed", "met"),
    [
        ("torch==2.13.0", "2.13.0+cpu", True),
        ("torch==2.13.0", "2.13.1", False),
        ("rich>=13", "15.0.0", True),
        ("transformer-engine[pytorch]>=2.19", "2.9.1", False),
        ("psutil", "0.1", True),
    ],
)
def test_versions_are_compared_as_numbers(line: str, installed: str, met: bool) -> None:
    assert versions.parsed(line).meets(installed) is met


def test_an_installed_package_tells_its_needs_where_there_is_no_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "CHECKOUT", tmp_path)
    metadata = tmp_path / "site" / "refit-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(
        "Metadata-Version: 2.1\nName: refit\nVersion: 0.1.0\nRequires-Dist: rich>=13\n"
        'Requires-Dist: torch==2.13.0; extra == "cpu"\nRequires-Dist: vllm==0.31.0; extra == "cuda"\n'
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    assert [need.package for need in versions.needs_of("cpu")] == ["rich", "torch"]
    assert [need.package for need in versions.needs_of("cuda")] == ["rich", "vllm"]
