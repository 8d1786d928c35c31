"""What one rank did in one refit."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from refit.transfer.digest import MASK

PACK, WIRE, UNPACK, DIGEST = "pack", "wire", "unpack", "digest"


@dataclass(frozen=True, slots=True)
class BulkReport:
    """Bytes are payload (elements times wire item size, no padding). Seconds add up over the streams of the rank.

    digests[tensor][dst_rank]: on a trainer of what it sent there, on a generator of what it now holds (its own rank).
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    digests: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    peak_extra_bytes: int = 0


class Tally:
    """The running sums behind a BulkReport. One thread at a time."""

    def __init__(self) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self.seconds = {PACK: 0.0, WIRE: 0.0, UNPACK: 0.0, DIGEST: 0.0}
        self.digests: dict[str, dict[int, int]] = {}
        self.peak_extra_bytes = 0

    def add_digest(self, tensor: str, dst_rank: int, value: int) -> None:
        """Add a part's digest; parts of one (tensor, dst_rank) sum up to the digest of all of it."""
        sums = self.digests.setdefault(tensor, {})
        sums[dst_rank] = (sums.get(dst_rank, 0) + value) & MASK

    def clock(self, phase: str, since: float) -> float:
        """Add the seconds since `since` (a time.perf_counter()) to a phase; returns now, the start of the next one."""
        now = time.perf_counter()
        self.seconds[phase] += now - since
        return now

    def report(self) -> BulkReport:
        return BulkReport(
            self.bytes_sent, self.bytes_received, self.seconds, self.digests, self.peak_extra_bytes
        )


def merged(reports: Iterable[BulkReport], peak_extra_bytes: int) -> BulkReport:
    """One report over stages. The peak is not a sum: stages of one stream follow each other."""
    tally = Tally()
    for report in reports:
        tally.bytes_sent += report.bytes_sent
        tally.bytes_received += report.bytes_received
        for phase, seconds in report.seconds.items():
            tally.seconds[phase] += seconds
        for tensor, by_rank in report.digests.items():
            for rank, value in by_rank.items():
                tally.add_digest(tensor, rank, value)
    tally.peak_extra_bytes = peak_extra_bytes
    return tally.report()
