"""What a step takes of the machine, beside time: processors, memory, and what is copied from the host to the device."""

import os
import resource
import time

from sslr1.ops import transfer


class Usage:
    """Of this rank's process. Used like a stopwatch: `begin` before a step, `metrics` after it."""

    def begin(self) -> None:
        self._wall, self._cpu, self._sent = time.perf_counter(), time.process_time(), transfer.total()

    def metrics(self) -> dict:
        """Since `begin`, by their names in metrics.jsonl."""
        return {
            "perf/cpu_cores": (time.process_time() - self._cpu) / (time.perf_counter() - self._wall),
            "perf/host_memory_gb": resident_bytes() / 2**30,
            "perf/max_host_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "perf/host_to_device_mb": (transfer.total() - self._sent) / 1e6,
        }


def resident_bytes() -> int:
    """Memory that the process holds now, shared pages included."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
