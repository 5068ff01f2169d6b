"""Threads that compute, each on a core of its own while a CPU kernel is timed: a thread that moves leaves its cache behind, and two on one core take turns."""
import contextlib
import os


def _busy() -> dict:
    """Clock ticks that each thread of this process has computed for."""
    found = {}
    for name in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError, IndexError):
            with open(f"/proc/self/task/{name}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            found[int(name)] = int(fields[11]) + int(fields[12])
    return found


@contextlib.contextmanager
def pinned(call, least_ticks: int = 2):
    """Within it the threads that `call` (which is run a few times) computes on stay where they are, as many as there are cores; afterwards they are free again.
    Yields how many; 0 where the system does not say, or they are more than the cores."""
    if not hasattr(os, "sched_setaffinity") or not os.path.isdir("/proc/self/task"):
        yield 0
        return
    cores, before = sorted(os.sched_getaffinity(0)), _busy()
    for _ in range(200):
        call()
        spent = {thread: ticks - before.get(thread, 0) for thread, ticks in _busy().items()}
        workers = sorted(thread for thread, ticks in spent.items() if ticks >= least_ticks and 8 * ticks >= max(spent.values()))
        if sum(spent.values()) >= 10 * len(cores) * least_ticks:
            break
    if not workers or len(workers) > len(cores):
        yield 0
        return
    free = {thread: os.sched_getaffinity(thread) for thread in workers}
    try:
        for thread, core in zip(workers, cores):
            os.sched_setaffinity(thread, {core})
        yield len(workers)
    finally:
        for thread, mask in free.items():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread, mask)
