"""The search over a kernel's legal configs. The only importer of optuna; without it (or for small spaces) the pool is walked in a fixed shuffled order.

Optuna is the engine: every config that is tried is a trial of a study, with its time, cause of failure and seconds, in whatever storage is asked for, so
that a killed run goes on where it stopped and optuna-dashboard shows it. Its samplers know nothing of legality and repeat themselves; here each
suggestion is moved to the nearest legal config that was not tried yet.
"""
import json
import logging
import random
from importlib.util import find_spec

try:
    import fcntl
except ImportError:  # Windows: Optuna's own lock file
    fcntl = None

log = logging.getLogger("sparsetile")
BAD = 1e9  # what a failed config tells the model, in microseconds: FAIL trials are invisible to TPE


class Walk:
    """No study: the pool in a fixed shuffled order, the default first."""
    name = "shuffled"

    def __init__(self, pool: list[dict], seed: int):
        rest = pool[1:]
        random.Random(seed).shuffle(rest)
        self.todo = [pool[0], *rest]

    def ask(self):
        return self.todo.pop(0) if self.todo else None

    def tell(self, config, time_us, **attributes):
        pass

    def drop(self, config):
        pass


class Study:
    """An Optuna study over the pool."""

    def __init__(self, module, pool: list[dict], name: str, storage, sampler: str, seed: int, seeds=()):
        import optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.name = optuna, sampler
        self.tunables = module.TUNABLES
        self.pool = {self._key(c): c for c in pool}
        self.left = dict(self.pool)
        self.space = {t.name: optuna.distributions.CategoricalDistribution(list(range(len(t.values)))) for t in self.tunables}
        samplers = {"tpe": lambda: optuna.samplers.TPESampler(seed=seed, n_startup_trials=10, multivariate=True, constant_liar=True),
                    "random": lambda: optuna.samplers.RandomSampler(seed=seed), "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=seed)}
        if sampler not in samplers:
            raise ValueError(f"sampler: expected one of {', '.join(samplers)}, got {sampler!r}")
        self.study = optuna.create_study(study_name=name, storage=_storage(optuna, storage), sampler=samplers[sampler](), load_if_exists=True)
        self.history = {}
        for trial in self.study.get_trials(deepcopy=False):  # what an earlier, killed run already knows
            said = trial.user_attrs.get("result")
            if trial.state == optuna.trial.TrialState.COMPLETE and said:
                result = json.loads(said)
                key = self._key(result["config"])
                if key in self.pool:
                    self.history[key] = result
                    self.left.pop(key, None)
        self.first = [c for c in (pool[0], *seeds) if self._key(c) in self.left]
        self.pending = {}

    def _key(self, config):
        return tuple(t.values.index(config[t.name]) if config.get(t.name) in t.values else -1 for t in self.tunables)

    def ask(self):
        if not self.left:
            return None
        if self.first:
            config = self.first.pop(0)
            key = self._key(config)
            if key not in self.left:
                return self.ask()
            self.study.enqueue_trial(dict(zip(self.space, key)))
            trial = self.study.ask(self.space)
        else:
            trial = self.study.ask(self.space)
            wanted = tuple(trial.params[name] for name in self.space)
            key = wanted if wanted in self.left else min(self.left, key=lambda k: (sum(min(abs(a - b), 2) for a, b in zip(k, wanted)), k))
            if key != wanted:  # the model must learn from what was run, not from what was suggested
                self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
                self.study.enqueue_trial(dict(zip(self.space, key)))
                trial = self.study.ask(self.space)
        config = self.left.pop(key)
        self.pending[key] = trial
        return config

    def tell(self, config, time_us, **attributes):
        trial = self.pending.pop(self._key(config))
        trial.set_user_attr("result", json.dumps({"config": config, "time_us": time_us, **attributes}))
        self.study.tell(trial, BAD if time_us is None else time_us)

    def drop(self, config):
        """A config that was asked for and not tried: another run may."""
        self.study.tell(self.pending.pop(self._key(config)), state=self.optuna.trial.TrialState.FAIL)


def _storage(optuna, storage):
    if storage is None:
        return None
    if "://" in str(storage):
        return str(storage)
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    lock = {"lock_obj": _FileLock(f"{storage}.lock")} if fcntl else {}
    return JournalStorage(JournalFileBackend(str(storage), **lock))


class _FileLock:
    """A lock on the journal that the kernel lets go when its holder is killed; Optuna's own stays behind and costs the next run half a minute."""

    def __init__(self, path):
        self.path, self.handle = path, None

    def acquire(self):
        self.handle = open(self.path, "a")
        fcntl.flock(self.handle, fcntl.LOCK_EX)
        return True

    def release(self):
        self.handle.close()


def searcher(module, pool, name, storage=None, sampler="tpe", seed=0, seeds=()):
    """A Study, or a Walk where optuna is missing and no storage was asked for."""
    if find_spec("optuna"):
        return Study(module, pool, name, storage, sampler, seed, seeds)
    if storage is not None:
        raise ValueError("storage: expected optuna to be installed: pip install 'sparsetile[tune]'; or tune without a storage")
    log.warning("optuna is not installed (pip install 'sparsetile[tune]'): the legal configs are tried in a fixed shuffled order")
    return Walk(pool, seed)
