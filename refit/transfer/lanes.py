"""Stages over streams: stage i runs on lane i mod num_streams; a lane runs its stages in order.

A lane is a thread, and on a CUDA device a stream of its own too. Trainers have one stage and hence one lane. All
generators run the same stages in the same order per lane, and lanes share no process group: no circle of waits forms.
"""

from collections.abc import Callable, Mapping, Sequence
from threading import Lock, Thread

import torch

from refit.transfer.bulk import StageJob
from refit.transfer.report import BulkReport, merged
from refit.transfer.transports.seam import wait_for_stream


class _Lanes:
    """What the lanes of one call share: the finished reports and the first error."""

    def __init__(
        self,
        move: Callable[[StageJob], BulkReport],
        callers: "Mapping[torch.device, torch.cuda.Stream]",
        on_error: Callable[[Exception], object],
    ) -> None:
        self._move = move
        self._callers = callers
        self._on_error = on_error
        self._lock = Lock()
        self.reports: dict[int, list[BulkReport]] = {}
        self.error: Exception | None = None

    def run(self, number: int, jobs: Sequence[StageJob]) -> None:
        try:
            for job in jobs:
                report = _on_stream(job, self._move, self._callers).placed(job.stage.stage, number)
                with self._lock:
                    self.reports.setdefault(number, []).append(report)
        except Exception as error:
            with self._lock:
                is_first = self.error is None
                self.error = self.error or error
            if is_first:
                self._on_error(error)


def run_lanes(
    jobs: Sequence[StageJob],
    move: Callable[[StageJob], BulkReport],
    num_streams: int,
    on_error: Callable[[Exception], object],
) -> BulkReport:
    """Run all jobs and sum their reports; peak memory is the sum over lanes of each lane's largest stage.

    The first error of any lane is given to `on_error`, which must free the other lanes, and is raised when all ended.
    """
    devices = {job.device for job in jobs if job.device.type == "cuda"}
    callers = {device: torch.cuda.current_stream(device) for device in devices}  # a thread has its own
    lanes = _Lanes(move, callers, on_error)
    dealt = [jobs[number::num_streams] for number in range(min(num_streams, len(jobs)))]
    threads = [
        Thread(target=lanes.run, args=(number, share), name=f"refit-lane-{number}", daemon=True)
        for number, share in enumerate(dealt)
        if number > 0
    ]
    for thread in threads:
        thread.start()
    if dealt:
        lanes.run(0, dealt[0])
    for thread in threads:
        thread.join()  # bounded: every wait inside a lane ends at the job's deadline
    if lanes.error is not None:
        raise lanes.error
    peak = sum(max(report.peak_extra_bytes for report in reports) for reports in lanes.reports.values())
    return merged([report for reports in lanes.reports.values() for report in reports], peak)


def _on_stream(
    job: StageJob,
    move: Callable[[StageJob], BulkReport],
    callers: "Mapping[torch.device, torch.cuda.Stream]",
) -> BulkReport:
    """Move on a stream of its own, after what the caller of `run_lanes` has queued on its stream."""
    if job.device.type != "cuda":
        return move(job)
    stream = torch.cuda.Stream(job.device)  # type: ignore[no-untyped-call]
    stream.wait_stream(callers[job.device])
    with torch.cuda.stream(stream):
        report = move(job)
    wait_for_stream(stream, job.deadline)
    return report
