"""The legal configs of a kernel for a problem: every combination of its tunables whose resources fit, known before anything is compiled. Of combinations that make the same call there is one."""
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
    found, seen = [default], {call_of(module, problem, default)}
    for configs in _calls(module, names, values, seed):
        first = next(configs)
        call = call_of(module, problem, first)
        if call in seen:
            continue
        config = next((c for c in itertools.chain([first], configs) if isinstance(module.resources(problem, c), Resources)), None)
        if config is not None:
            seen.add(call)
            found.append(config)
    return found, total


def _calls(module, names, values, seed: int):
    """Of each call the configs that make it, which differ in knobs that do nothing on its path (those are in reach of `resources` all the same): half a million configs are some thousand calls."""
    paths = values[names.index("path")] if "path" in names else (None,)
    active = [[path is None or not t.paths or path in t.paths for t in module.TUNABLES] for path in paths]
    spaces = [[(path,) if t.name == "path" else v for t, v in zip(module.TUNABLES, values)] for path in paths]
    if sum(math.prod(len(v) for v, does in zip(space, acts) if does) for space, acts in zip(spaces, active)) > MOST:
        rng = random.Random(seed)
        yield from (iter([{name: rng.choice(v) for name, v in zip(names, values)}]) for _ in range(MOST))
        return
    for space, acts in zip(spaces, active):
        for point in itertools.product(*(v if does else (None,) for v, does in zip(space, acts))):
            idle = itertools.product(*((x,) if does else v for x, v, does in zip(point, space, acts)))
            yield (dict(zip(names, one)) for one in idle)


def call_of(module, problem: Problem, config: dict) -> tuple:
    """What of a config a call knows: knobs that do nothing on its path are None, parts that are all of an axis 0."""
    def word(t):
        if t.paths and config["path"] not in t.paths:
            return None
        value = config.get(t.name)
        return 0 if t.part_of and value and value >= 1 << (problem[t.part_of] - 1).bit_length() else value
    return tuple(map(word, module.TUNABLES))


def members(module, problem: Problem, pool: list[dict], configs) -> list[dict]:
    """The legal configs that make the calls of these; of those that are not legal today there is none."""
    wanted = [call_of(module, problem, {**pool[0], **config}) for config in configs]
    found = {call: c for c in pool if (call := call_of(module, problem, c)) in wanted} if wanted else {}
    return [found[call] for call in wanted if call in found]


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
