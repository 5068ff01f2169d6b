"""Tasks shared by any number of processes and hosts, in the storage that holds their trials: who works on what, and what a dead one left.

A claim is a trial of one study; of the claims of a task that live, the first is the owner's, unless the task was done since its claimant looked. A claim lives as long as its
process where that can be seen, elsewhere while its owner renews it: who looks counts the time since it last saw a renewal, so that no two hosts' clocks are compared. So
nothing is done twice, and what a dead worker held returns to the list.
"""
import contextlib
import os
import socket
import threading
import time

from sparsetile.autotune import search

LEASE = 60.0  # seconds; renewed three times as often


def _here() -> str:
    """Where numbers of processes mean the same: a boot of a machine, and a container's count of its own. Names of hosts come twice."""
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{socket.gethostname()}/{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


_HERE = _here()


def _me() -> str:
    return f"{_HERE}:{os.getpid()}:{_born(os.getpid())}"


def _born(pid: int) -> str:
    """When a process of this host began, as its kernel counts; empty if there is none: numbers of processes come again."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except OSError:
        return ""


class WorkList:
    """The tasks of one storage, by name."""

    def __init__(self, storage, name: str = "sparsetile/tasks"):
        self.optuna = search.engine()
        self.study = self.optuna.create_study(study_name=name, storage=search.storage_of(storage), load_if_exists=True)
        self.renewals = {}  # claim -> (what it last said, when that was first seen)

    def _claims(self, task: str) -> list:
        return [t for t in self.study.get_trials(deepcopy=False) if t.user_attrs.get("task") == task]

    def _live(self, claims) -> list:
        return [t for t in claims if t.state == self.optuna.trial.TrialState.RUNNING and self._alive(t.number, t.user_attrs["owner"], t.user_attrs.get("renewed"))]

    def _alive(self, claim: int, owner: str, renewed) -> bool:
        host, pid, born = owner.rsplit(":", 2)
        if host == _HERE and os.path.exists("/proc/self/stat"):
            return _born(int(pid)) == born
        if self.renewals.get(claim, (None,))[0] != renewed:
            self.renewals[claim] = renewed, time.monotonic()
        return time.monotonic() - self.renewals[claim][1] < LEASE

    def _finished(self, claims) -> set:
        return {t.number for t in claims if t.state == self.optuna.trial.TrialState.COMPLETE}

    def done(self, task: str) -> bool:
        return bool(self._finished(self._claims(task)))

    def claim(self, task: str, again: bool = False) -> "Claim | None":
        """The task, or None if it is done (unless again) or another's."""
        claims, state = self._claims(task), self.optuna.trial.TrialState
        before = self._finished(claims)
        if self._live(claims) or before and not again:
            return None
        for dead in claims:
            if dead.state == state.RUNNING:
                self._end(dead._trial_id, state.FAIL)
        storage = self.study._storage
        template = self.optuna.trial.create_trial(state=state.RUNNING, user_attrs={"task": task, "owner": _me(), "renewed": 0}, value=None)
        mine = storage.create_new_trial(self.study._study_id, template)
        claims = self._claims(task)
        first = min(self._live(claims), key=lambda t: t.number)
        if first._trial_id != mine or self._finished(claims) - before:  # another came first, or came and went between the look and the claim
            self._end(mine, state.FAIL)
            return None
        return Claim(self, mine)

    def _end(self, trial_id: int, state, values=None):
        with contextlib.suppress(RuntimeError, self.optuna.exceptions.UpdateFinishedTrialError):  # another has ended it: this host slept, say
            self.study._storage.set_trial_state_values(trial_id, state, values)


class Claim:
    """A task that is this process's: `with` renews its lease; `finish` says that it is done, else it returns to the list."""

    def __init__(self, owner: WorkList, trial_id: int):
        self.owner, self.trial_id, self.over, self.finished = owner, trial_id, threading.Event(), False

    def __enter__(self):
        self.thread = threading.Thread(target=self._renew, daemon=True)
        self.thread.start()
        return self

    def _renew(self):
        turn = 0
        while not self.over.wait(LEASE / 3):
            turn += 1
            with contextlib.suppress(Exception):  # a storage that is away for a moment: the next turn tries again, and the lease ends by itself
                self.owner.study._storage.set_trial_user_attr(self.trial_id, "renewed", turn)

    def finish(self):
        self.finished = True

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()
        state = self.owner.optuna.trial.TrialState
        self.owner._end(self.trial_id, state.COMPLETE if self.finished else state.FAIL, [0.0] if self.finished else None)
