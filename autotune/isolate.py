"""Processes that may die. Orders go down a pipe and answers come back; a process that faults, hangs or loses its device is killed with its children and replaced.

    worker = Worker("sparsetile.autotune.trial:Bench", device)
    worker.open(workload, seed)                                what it works on from now on: every new process is told, before the next order
    worker("attempt", backend, config, best_us, seconds=5)     what Bench(...).attempt(...) returns; raises Lost with the cause, or Failed with its exception's words

The process makes its object once and keeps it. It dies with its parent. An object whose attribute `broken` is set asks to be replaced.
"""
import atexit
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

_alive = weakref.WeakSet()
STARTING = 180.0  # seconds until a process has imported everything and made its inputs


class Failed(RuntimeError):
    """The order raised an exception in the process, which is well."""


class Lost(RuntimeError):
    """The process is gone: how."""


class Worker:
    """One object in a process of its own, started at the first order and again after a loss."""

    def __init__(self, role: str, *args, env: dict | None = None):
        self.role, self.args, self.env, self.process, self.starts, self.opening, self.opened = role, args, env or {}, None, 0, None, False
        _alive.add(self)

    def open(self, *args) -> None:
        self.opening, self.opened = args, False

    def start(self) -> None:
        """Begin to start, if it does not run: the process is at work while the caller goes on."""
        if self.process is not None:
            return
        self.pipe, theirs = Pipe()
        self.words = tempfile.TemporaryFile()
        package = Path(importlib.import_module(__name__.partition(".")[0]).__file__).resolve().parent  # the process must find this one
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]), **self.env}
        self.process = subprocess.Popen([sys.executable, "-c", f"from {__name__} import serve; serve({theirs.fileno()})"], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self.words,
                                        stderr=self.words, env=env, start_new_session=True)
        theirs.close()
        self.starts += 1
        self.pipe.send((sys.path, self.role, self.args))
        self.ready = False

    def __call__(self, method: str, *args, seconds: float | None = None):
        self.start()
        try:
            if not self.ready:
                self._answer(STARTING)
                self.ready, self.opened = True, False
            if self.opening is not None and not self.opened:
                self.pipe.send(("open", self.opening))
                self._answer(STARTING)
                self.opened = True
            self.pipe.send((method, args))
            return self._answer(seconds)
        except (EOFError, OSError):
            raise Lost(self._death()) from None

    def _answer(self, seconds):
        if not self.pipe.poll(seconds):
            self.kill()
            raise Lost(f"hang: no answer within {seconds:.3g} s")
        answer, broken = self.pipe.recv()
        if broken:
            self.kill()
        if isinstance(answer, Failed):
            raise Lost(str(answer)) if broken else answer
        return answer

    def _death(self) -> str:
        """How the process ended, and its last words."""
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            code = None
        self.words.seek(0)
        words = self.words.read().decode(errors="replace").strip().splitlines()
        self.kill()
        how = "closed its pipe" if code is None else f"crash: {signal.Signals(-code).name}" if code < 0 else f"exit: status {code}"
        return how + (f": {words[-1][:200]}" if words else "")

    def kill(self) -> None:
        if self.process is None:
            return
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.pipe.close(), self.words.close()
        self.process = None


class Inline:
    """The same orders without a process: for callers that cannot have one, and tests that change a kernel under the tuner's feet."""

    starts = 1

    def __init__(self, make, *args):
        self.object = make(*args)

    def open(self, *args):
        self.object.open(*args)

    def __call__(self, method, *args, seconds=None):
        return getattr(self.object, method)(*args)

    def start(self):
        pass

    kill = start


@atexit.register
def _end():
    for worker in list(_alive):
        worker.kill()


def find(role: str):
    """"package.module:Name" -> the object."""
    module, _, name = role.partition(":")
    return getattr(importlib.import_module(module), name)


def with_parent() -> None:
    """This process dies with the one that started it, where the system can see to that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def serve(handle: int) -> None:
    """The process's own part: answers orders until the pipe closes."""
    with_parent()
    pipe, made, answer = Connection(handle), None, None
    sys.path[:], role, args = pipe.recv()
    try:
        made = find(role)(*args)
    except Exception as error:  # noqa: BLE001 (told to the parent, whatever it is)
        answer = Failed(f"{type(error).__name__}: {error}")
    try:
        pipe.send((answer, made is None))
        while True:
            method, args = pipe.recv()
            try:
                answer = getattr(made, method)(*args)
            except Exception as error:  # noqa: BLE001
                answer = Failed(f"{type(error).__name__}: {error}")
            pipe.send((answer, getattr(made, "broken", False)))
    except (EOFError, BrokenPipeError):
        pass
