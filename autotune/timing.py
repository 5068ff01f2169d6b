"""How long a call takes: device events or the wall clock, cold L2, medians over interleaved rounds.

A `Stopwatch` belongs to a device (None is the CPU). Times are in microseconds.
"""
import math
import statistics
import time

from sparsetile.autotune import graphs

POLISH = 4  # passes over rows and columns
WIDE = 0.02  # a band of ties that says more of the timing than of the configs
ENOUGH = 0.01  # an error of the best one's centre at which the finals may end
LONGEST = 15  # times their seconds that a CPU's finals may take


class Stopwatch:
    """Times calls on one device. `cold` empties the L2 cache between calls on a GPU, by writing at least `flush_mb` (an eighth of its memory at most): the host launches meanwhile."""

    def __init__(self, device: int | None, cold: bool = True, flush_mb: int = 64):
        self.device, self.cold = device, cold
        if device is not None:
            import torch
            from sparsetile.backends import devices
            self.torch = torch
            info = devices.device_info(device)
            size = max(2 * info.l2_mb, min(flush_mb, int(info.memory_gb * 128))) << 20
            self.flush = torch.empty(size // 4, dtype=torch.int32, device=f"cuda:{device}") if cold else None

    def synchronize(self):
        if self.device is not None:
            self.torch.cuda.synchronize(self.device)

    def samples(self, call, count: int) -> list[float]:
        """`count` single timings of call()."""
        if self.device is None:
            found = []
            for _ in range(count):
                start = time.perf_counter()
                call()
                found.append((time.perf_counter() - start) * 1e6)
            return found
        if isinstance(call, graphs.Recorded):
            return [call.sample(self.flush) for _ in range(count)]
        torch = self.torch
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        with torch.cuda.device(self.device):
            for begin, end in pairs:
                if self.flush is not None:
                    self.flush.zero_()  # also covers the host's time to launch, so that it is not measured
                begin.record()
                call()
                end.record()
            torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e3 for begin, end in pairs]

    def centre(self, samples: list[float]) -> float:
        """Of a few samples of one call: the median on a GPU; the minimum on a CPU, where what comes between only adds. (Rounds are compared by their medians, on a CPU `levelled`.)"""
        return min(samples) if self.device is None else statistics.median(samples)


def screen(watch: Stopwatch, call, best_us: float, reps: int = 5) -> list[float]:
    """A warm call, then a few timings; stops after the first if it is over twice the best known."""
    call()
    watch.synchronize()
    samples = watch.samples(call, 1)
    return samples if samples[0] > 2 * best_us else samples + watch.samples(call, reps - 1)


def finals(watch: Stopwatch, calls: list, seconds: float = 2.0, most: int = 40) -> list[list[float]]:
    """Interleaved rounds with a rotating start, so that clock and temperature touch all alike. At least five rounds."""
    samples = [[] for _ in calls]
    start, turn = time.monotonic(), 0
    while turn < most and (turn < 5 or time.monotonic() - start < seconds):
        for n in range(len(calls)):
            at = (n + turn) % len(calls)
            samples[at] += watch.samples(calls[at], 1)
        turn += 1
    return samples


def ranked(watch: Stopwatch, calls: list, seconds: float, kept=(), clock=lambda: None) -> tuple[list, list]:
    """(samples of each call, the clock after each round): interleaved rounds as in `finals`, and who falls behind beyond all doubt leaves, but for those `kept`.

    Forty rounds or `seconds`; where the best one's error is still over ENOUGH, up to 160 and twice as long (on a CPU 640 and three times, and LONGEST where it is over WIDE, for its neighbours' work
    scatters more and only more rounds tell). What is left of a round whose clock is not the others' is taken out. Samples of a CPU are `levelled`.
    """
    samples, clocks, inside, start = [[] for _ in calls], [], list(range(len(calls))), time.monotonic()
    level = levelled if watch.device is None else list
    most = 160 if watch.device is not None else 640
    while True:
        turn, spent = len(clocks), time.monotonic() - start
        if turn >= 5 and (turn >= 40 or spent >= seconds):
            over = _error(level(samples))
            if turn >= most or over <= ENOUGH or spent >= (2 if watch.device is not None else 3 if over <= WIDE else LONGEST) * seconds:
                break
        for n in range(len(inside)):
            at = inside[(n + turn) % len(inside)]
            samples[at] += watch.samples(calls[at], 1)
        clocks.append(clock())
        if turn in LEAVING:
            inside = _still(level(samples), inside, kept, turn)
    steady = _steady(clocks)
    return [[one for one, right in zip(found, steady) if right] for found in level(samples)], clocks


def levelled(samples: list) -> list:
    """Samples of interleaved rounds (sample t of each is of round t; who left has fewer) against the other calls of their rounds: what those share, a clock that falls or a neighbour's work, is taken
    out. By median polish (Tukey 1977) of the logarithms; in the end a round's level for a call is the median of the others' rests, so that nobody's noise is in its own level."""
    logs = [[math.log(one) for one in found] for found in samples]
    inside = [[n for n, found in enumerate(logs) if t < len(found)] for t in range(max(map(len, logs), default=0))]
    level, middle = [0.0] * len(inside), statistics.median
    for _ in range(POLISH):
        own = [middle([one - level[t] for t, one in enumerate(found)]) if found else 0.0 for found in logs]
        level = [middle([logs[n][t] - own[n] for n in calls]) for t, calls in enumerate(inside)]
    others = lambda t, n: middle([logs[m][t] - own[m] for m in inside[t] if m != n] or [0.0])
    return [[math.exp(one - others(t, n)) for t, one in enumerate(found)] for n, found in enumerate(logs)]


LEAVING = {2: 0.25, 7: 0.02, 15: 0.02, 31: 0.02}  # after these rounds leaves who is so far behind, beside the noise


def _error(samples) -> float:
    return error(min((found for found in samples if found), key=statistics.median))


def _still(samples, inside, kept, turn) -> list:
    centres = {n: statistics.median(samples[n]) for n in inside}
    best = min(centres, key=centres.get)
    doubt = {n: LEAVING[turn] + 3 * (noise(samples[n], centres[n]) + noise(samples[best], centres[best])) for n in inside}
    return [n for n in inside if n in kept or centres[n] <= centres[best] * (1 + doubt[n])]


def _steady(clocks: list, within: float = 0.02) -> list:
    """Which rounds ran at the clock of most; all of them where the clock is not known, or is a different one each time (a chip at the limit of its power)."""
    known = [clock for clock in clocks if clock]
    if len(known) < len(clocks):
        return [True] * len(clocks)
    middle = statistics.median(known)
    steady = [abs(clock - middle) <= within * middle for clock in clocks]
    return steady if sum(steady) >= max(5, len(clocks) / 2) else [True] * len(clocks)


def spread(samples: list[float]) -> dict:
    """The 20th and 80th percentiles and the count."""
    ordered = sorted(samples)
    return {"p20": round(ordered[int(0.2 * (len(ordered) - 1))], 2), "p80": round(ordered[int(0.8 * (len(ordered) - 1))], 2), "n": len(ordered)}


def error(samples: list[float]) -> float:
    """By how much two such medians may differ by chance, one time in twenty: 1.96 sqrt(2) times a median's error, 1.25 deviations of the samples over the square root of their count; 0.84 of a deviation is `noise`."""
    return 4 * noise(samples, statistics.median(samples))


def noise(samples: list[float], centre: float) -> float:
    """Half the width of the middle 60 % over the square root of the count, relative to the centre: an error of the centre."""
    s = spread(samples)
    return (s["p80"] - s["p20"]) / 2 / max(centre, 1e-9) / max(1, s["n"]) ** 0.5
