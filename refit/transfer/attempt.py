"""What a rank has done so far in one attempt to bring a version over."""

from dataclasses import dataclass, field, replace

from refit.transfer.protocol import RefitReport
from refit.transfer.report import BulkReport, Span


@dataclass(slots=True)
class Attempt:
    """`began` is the time.perf_counter() of `started_s`, `deadline` a time.monotonic()."""

    version: int
    attempt: int
    deadline: float
    started_s: float
    began: float
    bulk: BulkReport = field(default_factory=BulkReport)
    misc_bytes: int = 0
    misc: Span | None = None
    misc_digests: dict[str, int] = field(default_factory=dict)

    def spans(self) -> tuple[Span, ...]:
        """All spans, in seconds since the attempt began."""
        found = self.bulk.spans if self.misc is None else (*self.bulk.spans, self.misc)
        return tuple(
            replace(span, start_s=span.start_s - self.began, stop_s=span.stop_s - self.began)
            for span in found
        )

    def report(self) -> RefitReport:
        """All of it, for the coordinator."""
        bulk, misc = self.bulk, self.misc
        return RefitReport(
            version=self.version,
            started_s=self.started_s,
            bytes_sent=bulk.bytes_sent,
            bytes_received=bulk.bytes_received,
            wire_bytes_sent=bulk.wire_bytes_sent,
            wire_bytes_received=bulk.wire_bytes_received,
            misc_bytes=self.misc_bytes,
            seconds={**bulk.seconds, "misc": 0.0 if misc is None else misc.stop_s - misc.start_s},
            digests=bulk.digests,
            misc_digests=self.misc_digests,
            peak_extra_bytes=bulk.peak_extra_bytes,
            spans=self.spans(),
        )
