"""The search over a kernel's legal configs. The only importer of optuna; without it the pool is walked in a fixed shuffled order.

Optuna is the engine: every config that is tried is a trial of a study, with its time and cause of failure, in whatever storage is asked for, so that a
killed run goes on where it stopped and optuna-dashboard shows it. "pool" is our sampler (parzen.py). Optuna's own know nothing of legality and repeat themselves; here
each suggestion of theirs is moved to the nearest legal config that was not tried yet.
"""
import contextlib
import functools
import json
import logging
import os
import random
import re
from importlib.util import find_spec
from urllib.parse import urlsplit

from sparsetile.autotune import parzen

try:
    import fcntl
except ImportError:  # Windows: Optuna's own lock file
    fcntl = None

log = logging.getLogger("sparsetile")
BAD = 1e9  # what a failed config tells the model, in microseconds: FAIL trials are invisible to TPE
ANSWERS = 10.0  # seconds within which a proxy does
SAMPLERS = ("pool", "tpe", "random", "nsga2")


class Walk:
    """No study: the pool in a fixed shuffled order, the default first."""
    name = "shuffled"

    def __init__(self, pool: list[dict], seed: int):
        rest = pool[1:]
        random.Random(seed).shuffle(rest)
        self.todo, self.history = [pool[0], *rest], {}

    def ask(self):
        return self.todo.pop(0) if self.todo else None

    def tell(self, config, time_us, **attributes):
        pass

    def drop(self, config):
        self.todo.append(config)


class Study:
    """An Optuna study over the pool. seeds: configs to try right after the default (winners from elsewhere)."""

    def __init__(self, module, pool: list[dict], name: str, storage, sampler: str, seed: int, seeds=()):
        optuna = self.optuna = engine()
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}; choose one of these")
        self.tunables, self.name = module.TUNABLES, sampler
        self.pool = {self._key(c): c for c in pool}
        self.keys, self.number = list(self.pool), {key: n for n, key in enumerate(self.pool)}
        self.space = {t.name: optuna.distributions.CategoricalDistribution(list(range(len(t.values)))) for t in self.tunables}
        first = [self.number[self._key(c)] for c in (pool[0], *seeds) if self._key(c) in self.number]
        self.model = parzen.Pool(*parzen.places(self.tunables, list(self.pool.values())), seed, first)
        self.study = optuna.create_study(study_name=name, storage=storage_of(storage), sampler=self._sampler(sampler, seed), load_if_exists=True)
        self.history = {}
        for trial in self.study.get_trials(deepcopy=False):  # what an earlier, killed run already knows
            said = trial.user_attrs.get("result")
            if trial.state == optuna.trial.TrialState.COMPLETE and said:
                result = json.loads(said)
                key = self._key(result["config"])
                if key in self.pool and key not in self.history:
                    self.history[key] = result
                    self.model.tell(self.number[key], _value(result["time_us"]))
        self.pending = {}

    def _sampler(self, name, seed):
        samplers = self.optuna.samplers
        if name == "pool":
            return _pool_sampler(self.optuna)(self)
        return {"tpe": lambda: samplers.TPESampler(seed=seed, n_startup_trials=10, multivariate=True, constant_liar=True),
                "random": lambda: samplers.RandomSampler(seed=seed), "nsga2": lambda: samplers.NSGAIISampler(seed=seed)}[name]()

    def _key(self, config):
        return tuple(t.values.index(config[t.name]) if config.get(t.name) in t.values else -1 for t in self.tunables)

    def ask(self):
        """A config that was never given before, or None."""
        keys = self.keys
        if not self.model.free.any():
            return None
        if self.name == "pool" and self.space:  # Optuna asks no sampler about no knobs
            trial = self.study.ask(self.space)
            key = keys[self.study.sampler.given.pop(trial.number)]
        elif self.model.seeds:
            key = keys[self.model.ask()]
            trial = self._enqueued(key)
        else:
            trial = self.study.ask(self.space)
            wanted = tuple(trial.params[name] for name in self.space)
            left = [keys[n] for n in self.model.free.nonzero()[0]]
            key = wanted if wanted in self.number and self.model.free[self.number[wanted]] else min(left, key=lambda k: (sum(min(abs(a - b), 2) for a, b in zip(k, wanted)), k))
            self.model.free[self.number[key]] = False
            if key != wanted:  # the model must learn from what was run, not from what was suggested
                self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
                trial = self._enqueued(key)
        self.pending[key] = trial
        return self.pool[key]

    def _enqueued(self, key):
        self.study.enqueue_trial({name: max(0, value) for name, value in zip(self.space, key)})
        return self.study.ask(self.space)

    def tell(self, config, time_us, **attributes):
        key = self._key(config)
        trial = self.pending.pop(key)
        trial.set_user_attr("result", json.dumps({"config": config, "time_us": time_us, **attributes}))
        self.study.tell(trial, BAD if time_us is None else time_us)
        self.model.tell(self.number[key], _value(time_us))

    def drop(self, config):
        """A config that was asked for and not tried: another run may."""
        key = self._key(config)
        self.study.tell(self.pending.pop(key), state=self.optuna.trial.TrialState.FAIL)
        self.model.give_back(self.number[key])


def _value(time_us) -> float:
    return float("inf") if time_us is None else time_us


@functools.lru_cache(1)
def engine():
    """Optuna, where it is installed."""
    if not find_spec("optuna"):
        raise ValueError("storage: expected optuna to be installed: pip install 'sparsetile[tune]'; or tune without a storage")
    import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@functools.lru_cache(1)
def _pool_sampler(optuna):
    class PoolSampler(optuna.samplers.BaseSampler):
        """The next config of a Study's pool, as an Optuna sampler: knobs are sampled together, and never twice the same."""

        def __init__(self, owner):
            self.owner, self.given = owner, {}  # trial -> its config's place in the pool

        def infer_relative_search_space(self, study, trial):
            return self.owner.space

        def sample_relative(self, study, trial, search_space):
            place = self.given[trial.number] = self.owner.model.ask()
            key = self.owner.keys[place]
            return {name: max(0, value) for name, value in zip(self.owner.space, key)}

        def sample_independent(self, study, trial, name, distribution):
            raise ValueError(f"sampler: expected the knobs {', '.join(self.owner.space)}, got {name!r}; the pool sampler gives whole configs")
    return PoolSampler


def storage_of(storage):
    """An Optuna storage: None is memory, a path a journal file, the rest a URL (postgresql://..., sqlite:///..., grpc://host:port of `sparsetile proxy`). ValueError for one that does not answer."""
    if storage is None or not isinstance(storage, (str, bytes)) and not hasattr(storage, "__fspath__"):
        return storage
    optuna, text = engine(), os.fsdecode(storage)
    try:
        return _opened(optuna, text)
    except ImportError:
        raise
    except Exception as error:  # noqa: BLE001 (of the database's client, of its driver, or of a file that is no journal)
        raise ValueError(f"storage: expected a journal file that can be read and written, or the URL of a database that answers, got {_shown(text)} ({_why(error)}); correct it, or name another") from None


@contextlib.contextmanager
def answering(storage):
    """Within it, a storage that no longer answers ends the work in a sentence."""
    try:
        yield
    except Exception as error:
        if storage is None or type(error).__module__.partition(".")[0] not in ("optuna", "sqlalchemy", "grpc"):
            raise
        raise RuntimeError(f"storage: expected an answer of {_shown(os.fsdecode(storage) if isinstance(storage, (str, bytes, os.PathLike)) else str(storage))}, got none ({_why(error.__cause__ or error)}); run it again when it answers: what it was told is kept") from None


def _shown(storage: str) -> str:
    """Without its password."""
    return repr(re.sub(r"://([^/@:]*):[^@]*@", r"://\1:***@", storage))


def _why(error) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0] or 'no answer'}"


def _opened(optuna, text: str):
    if text.startswith("grpc://"):
        return _proxied(optuna, text)
    if text.startswith("sqlite://"):
        return optuna.storages.get_storage(text)
    if "://" in text:
        return optuna.storages.RDBStorage(text, engine_kwargs={"pool_pre_ping": True})
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    lock = {"lock_obj": _FileLock(text)} if fcntl else {}
    return JournalStorage(JournalFileBackend(text, **lock))


def _proxied(optuna, url):
    place = urlsplit(url)
    if not place.hostname or not place.port:
        raise ValueError("expected grpc://host:port; start one with `sparsetile proxy`")
    if find_spec("grpc") is None:
        raise ImportError("grpc is not installed: pip install grpcio protobuf")
    import grpc
    grpc.channel_ready_future(grpc.insecure_channel(place.netloc)).result(ANSWERS)
    return optuna.storages.GrpcStorageProxy(host=place.hostname, port=place.port)


class _FileLock:
    """A lock on the journal that the kernel lets go when its holder is killed; Optuna's own stays behind and costs the next run half a minute. Who holds it finds whole lines:
    the piece of one that a full disk or a lost machine left is cut off, for what is written behind it would make the journal unreadable."""

    def __init__(self, path):
        self.path, self.handle = path, None

    def acquire(self):
        self.handle = open(f"{self.path}.lock", "a")
        fcntl.flock(self.handle, fcntl.LOCK_EX)
        try:
            with open(self.path, "r+b") as journal:
                size = end = journal.seek(0, os.SEEK_END)
                while end and (journal.seek(end - 1), journal.read(1))[1] != b"\n":
                    end -= 1
                if end < size:
                    journal.truncate(end)
        except OSError:  # a journal that cannot be written: nobody else waits for it
            self.release()
            raise
        return True

    def release(self):
        self.handle.close()


def searcher(module, pool, name, storage=None, sampler="pool", seed=0, seeds=()):
    """A Study, or a Walk where optuna is missing and no storage was asked for."""
    if find_spec("optuna"):
        return Study(module, pool, name, storage, sampler, seed, seeds)
    if storage is not None:
        engine()
    log.warning("optuna is not installed (pip install 'sparsetile[tune]'): the legal configs are tried in a fixed shuffled order")
    return Walk(pool, seed)
