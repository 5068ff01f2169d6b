"""The legal configs of a kernel for a problem: every combination of its tunables whose resources fit, known before anything is compiled. Of combinations that differ only in
knobs which do nothing on their path there is one: those knobs are as in the default config."""
import itertools
import math
import random

from sparsetile.backends.contract import Problem, Resources

MOST = 200_000  # beyond this the product is sampled


def legal(module, problem: Problem, seed: int = 0, only: dict | None = None) -> tuple[list[dict], int]:
    """(legal configs, size of the whole product). The default config comes first; the rest is in the order of the tunables' values. only: knob -> the values it may have beside the default's config."""
    default = module.default_config(problem)
    names = [t.name for t in module.TUNABLES]
    values = [(only or {}).get(t.name, t.values) for t in module.TUNABLES]
    total = math.prod(map(len, values))
    if total <= MOST:
        points = itertools.product(*values)
    else:
        rng = random.Random(seed)
        points = ([rng.choice(v) for v in values] for _ in range(MOST))
    found, seen = [default], {tuple(default.get(n) for n in names)}
    for point in points:
        config = essential(module, dict(zip(names, point)), default)
        point = tuple(config.values())
        if point not in seen:
            seen.add(point)
            if isinstance(module.resources(problem, config), Resources):
                found.append(config)
    return found, total


def essential(module, config: dict, default: dict) -> dict:
    """The same call's config with the knobs that do nothing on its path as the default config has them."""
    idle = [t.name for t in module.TUNABLES if t.paths and config["path"] not in t.paths]
    return {**config, **{name: default[name] for name in idle}} if idle else config


def neighbours(config: dict, module) -> list[dict]:
    """Configs that differ in one knob by one step along its values."""
    found = []
    for t in module.TUNABLES:
        at = t.values.index(config[t.name])
        found += [{**config, t.name: t.values[i]} for i in (at - 1, at + 1) if 0 <= i < len(t.values)]
    return found


def cost_order(config: dict, module, problem: Problem):
    """A fixed order among configs that time alike: less shared memory, fewer threads, then the words of the config."""
    asked = module.resources(problem, config)
    return (asked.shared, asked.threads, tuple(sorted((k, str(v)) for k, v in config.items()))) if isinstance(asked, Resources) else (1 << 60, 0, ())
