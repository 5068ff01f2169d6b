"""The search of one backend's configs on one workload: asks the study, has the configs compiled ahead, gives the bench worker what is compiled first, and ends in the finals."""
import datetime
import statistics
import time
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, wait

from sparsetile.autotune import isolate, provenance, search, space, timing
from sparsetile.autotune.decide import Tried, decide, finalists
from sparsetile.ops import dispatch
from sparsetile.profiles import lookup

LEAST, TIMES = 5.0, 50  # a trial may take so many seconds, or so many times what the best one's calls take
COMPILING = 60.0        # and so long where the bench worker compiles
GRACE = 10.0            # a trial that the end of the budget finds at work may go on so long
FINALS = 2.0            # seconds of the finals, and more where the times scatter (timing.ranked)
PATIENCE, GAIN = (60, 0.25), 0.005  # so many trials, or such a share of those made, without such a gain: the search is over
SMALL = 256             # but not in a space of so few legal configs, which is searched whole if the budget lasts


class Hunt:
    """compilers: processes that compile ahead (ahead.py), or None: the bench worker compiles."""

    def __init__(self, backend, workload, problem, worker, compilers, say):
        self.backend, self.workload, self.problem, self.worker, self.compilers, self.say = backend, workload, problem, worker, compilers, say
        self.module = dispatch.kernel(backend, workload.kernel)
        self.tried, self.line, self.start, self.end, self.warm, self.gained, self.finals = [], deque(), time.monotonic(), None, 0, 0, FINALS
        self.then = None  # called when the last config was asked for: the compilers are free for what comes next

    def failures(self) -> Counter:
        return Counter(t.failure.partition(":")[0] for t in self.tried if t.failure)

    @property
    def best(self) -> float | None:
        return min((t.time_us for t in self.tried if t.time_us), default=None)

    def prepare(self, trials, storage, sampler, seed, seeds=(), only=None) -> None:
        """The legal configs and the study; the first of them go to the compilers."""
        w, self.trials = self.workload, trials
        self.pool, self.total = space.legal(self.module, self.problem, seed, only)
        seeds = space.members(self.module, self.problem, self.pool, seeds)
        self.study = search.searcher(self.module, self.pool, f"{w.kernel}/{self.backend}/{self.problem.arch}/{w.name}/{provenance.code(self.module)}", storage, sampler, seed, seeds)
        self.sampler, self.seed = self.study.name, seed
        self.tried = [Tried(self.backend, r["config"], r["time_us"], r.get("failure")) for r in getattr(self.study, "history", {}).values()]
        self.gained = len(self.tried)
        if self.compilers:
            self.fill()

    def search(self, seconds) -> None:
        self.start = time.monotonic()
        self.end = None if seconds is None else self.start + seconds
        if seconds is not None and self.problem.arch == "cpu":  # where they may go on for long: not longer than what was asked for
            self.finals = min(FINALS, seconds / timing.LONGEST)
        self.say({"event": "start", "workload": self.workload.name, "backend": self.backend, "feasible": len(self.pool), "total": self.total, "resumed": len(self.tried)})
        while not self._stagnant():
            self.fill()
            if not self.line or self._over() and self.tried:
                break
            config, compiled = self._first()
            begun, before = time.monotonic(), self.best
            one = self._try(config, compiled)
            if one is None:
                self.line.append((config, compiled))
                break
            one.seconds = round(time.monotonic() - begun, 3)
            self.study.tell(config, one.time_us, failure=one.failure)
            self.tried.append(one)
            if one.time_us and (before is None or one.time_us < before * (1 - GAIN)):
                self.gained = len(self.tried)
            self.say({"event": "trial", "workload": self.workload.name, "backend": self.backend, "config": config, "time_us": one.time_us, "failure": one.failure, "done": len(self.tried),
                      "best_us": self.best, "seconds": one.seconds})
        self.drop()
        self._asked_all()
        enough = self.trials is not None and len(self.tried) >= self.trials
        self.stop = "exhausted" if len(self.tried) >= len(self.pool) else "trials" if enough else "stagnation" if self._stagnant() else "seconds"

    def fill(self) -> None:
        """Ask for as many configs as can be compiled side by side, and for none that would not be compiled in time."""
        width, compiling = (self.compilers.width, self.compilers.typical) if self.compilers else (1, 0.0)
        while len(self.line) < width:
            more = (self.trials is None or len(self.tried) + len(self.line) < self.trials) and (self.end is None or time.monotonic() + compiling < self.end)
            config = self.study.ask() if more or not self.tried and not self.line else None
            if config is None:
                return self._asked_all()
            self.line.append((config, self.compilers and self.compilers.submit(self.workload, self.backend, config)))

    def _asked_all(self) -> None:
        then, self.then = self.then, None
        if then is not None:
            then()

    def drop(self) -> None:
        """What was asked for, and never tried."""
        while self.line:
            config, compiled = self.line.popleft()
            self.study.drop(config)
            compiled and compiled.cancel()

    def _first(self) -> tuple:
        """The config that is compiled first; where nothing is when the budget ends, the one that was asked for first."""
        if self.compilers:
            wait([compiled for _, compiled in self.line], None if self.end is None else self._left(), FIRST_COMPLETED)
            ready = next((n for n, (_, compiled) in enumerate(self.line) if compiled.done()), 0)
            self.line.rotate(-ready)
        return self.line.popleft()

    def _stagnant(self) -> bool:
        return self.trials is None and len(self.pool) > SMALL and len(self.tried) - self.gained >= max(PATIENCE[0], PATIENCE[1] * len(self.tried))

    def _over(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end

    def _left(self) -> float:
        return float("inf") if self.end is None else max(0.0, self.end - time.monotonic()) + GRACE

    def _try(self, config, compiled) -> Tried | None:
        """One config, by the bench worker. None if the budget ended before it did: that is no failure of the config's."""
        if compiled is not None:
            try:
                refused, left = compiled.result(0)
            except TimeoutError:
                return None
            if refused:
                return Tried(self.backend, config, None, refused)
        failure = None
        for turn in range(2):
            slow = compiled is None or left or self.worker.starts != self.warm or self.worker.process is None  # a new process loads its compilers first
            limit = max(LEAST, TIMES * (self.best or 0) / 1e6) + (COMPILING if slow else 0)
            allowed = min(limit, self._left())
            try:
                told = self.worker("attempt", self.backend, config, self.best or float("inf"), seconds=allowed)
                self.warm = self.worker.starts
                return Tried(self.backend, config, told["time_us"], told["failure"])
            except (isolate.Lost, isolate.Failed) as error:
                failure = str(error)[:300]
                if failure.startswith("hang"):
                    if allowed < limit and self.tried:
                        return None
                    break
        return Tried(self.backend, config, None, failure)  # twice on fresh processes: never again

    def entry(self, incumbent: dict | None = None) -> dict | None:
        """The finals, interleaved in one process, and what is written of them. incumbent: what a profile of this device says now; it stays among ties."""
        default = self.pool[0]
        incumbent = next(iter(space.members(self.module, self.problem, self.pool, [incumbent] if incumbent else [])), None)
        always = [default, *[incumbent] * (incumbent is not None)]
        chosen = finalists(self.backend, self.tried, always)
        answer = self._finals(chosen, [n for n, t in enumerate(chosen) if t.config in always])
        if answer is None:
            return None
        samples, about = answer
        for one, found in zip(chosen, samples):
            one.samples, one.time_us = found, found and statistics.median(found)
        errors = dict(zip(map(id, chosen), about.get("errors", ())))
        chosen = [one for one in chosen if one.samples]
        if not chosen:
            return None
        entry = decide(chosen, default, self.module, self.problem, incumbent)
        error = next((errors.get(id(one)) for one in chosen if one.config == entry["config"]), None)
        entry |= {"key": lookup.key_of(self.problem), "backend": self.backend, "workload": self.workload.name, "code": provenance.code(self.module), "status": "tuned",
                  "date": datetime.date.today().isoformat(), "inputs": f"standard normal, seed {self.seed}", **({"err": error} if error else {}),
                  "search": {"sampler": self.sampler, "evaluated": len(self.tried), "feasible": len(self.pool), "failed": sum(self.failures().values()), "seed": self.seed,
                             "stop": self.stop, "seconds": round(time.monotonic() - self.start, 1)}}
        entry |= {name: about[name] for name in ("launch", "clock_mhz", "clocks") if name in about}
        self.say({"event": "final", "workload": self.workload.name, "backend": self.backend, "entry": entry})
        return entry

    def _finals(self, chosen: list, kept: list):
        """What the bench worker says; a second time without graphs, which may have been what broke it."""
        for recorded in (True, False):
            try:
                return self.worker("finals", [(t.backend, t.config) for t in chosen], self.finals, kept, recorded, seconds=COMPILING * 2)
            except (isolate.Lost, isolate.Failed) as error:
                failure = f"finals: {error}"
        self.say({"event": "trial", "workload": self.workload.name, "backend": self.backend, "config": {}, "time_us": None, "failure": failure, "done": len(self.tried), "best_us": self.best})
        return None
