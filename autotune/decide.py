"""Which of the finalists is written: ties go to what an earlier profile says, else to the smaller config in a fixed order, and the default stays unless the gain is real."""
from dataclasses import dataclass, field

from sparsetile.autotune import space, timing

FINALISTS = 8
SECONDS = 2.0  # for five rounds of those beyond the first two, so that slow calls have fewer finalists
GAIN = 0.02  # a winner must beat the default by this or by what may be chance, whichever is more


@dataclass
class Tried:
    """One config on one backend."""
    backend: str
    config: dict
    time_us: float | None = None
    failure: str | None = None
    seconds: float = 0.0
    samples: list = field(default_factory=list)


def finalists(backend: str, tried: list, always: list) -> list:
    """The best few, and `always` (the default, what a profile says now)."""
    right = sorted((t for t in tried if t.time_us), key=lambda t: t.time_us)
    chosen, spent = [], 0.0
    for t in right[:FINALISTS]:
        spent += 5e-6 * t.time_us
        if len(chosen) < 2 or spent <= SECONDS:
            chosen.append(Tried(backend, t.config))
    for config in always:
        chosen += [Tried(backend, config)] * all(t.config != config for t in chosen)
    return chosen


def decide(finalists: list, default: dict, module, problem, incumbent: dict | None = None) -> dict:
    """The entry's figures of a backend's winner."""
    base = next((t for t in finalists if t.config == default), None)
    best = min(finalists, key=lambda t: t.time_us)
    band = max(0.01, timing.error(best.samples))
    ties = [t for t in finalists if t.time_us <= best.time_us * (1 + band)]
    winner = next((t for t in ties if t.config == incumbent), None) or min(ties, key=lambda t: space.cost_order(t.config, module, problem))
    if base is not None:
        need = max(GAIN, timing.error(base.samples))
        if winner is not base and winner.time_us > base.time_us * (1 - need):
            winner = base
    entry = {"config": dict(winner.config), "time_us": round(winner.time_us, 2), "spread": timing.spread(winner.samples), "ties": len(ties), "band": round(band, 4)}
    if base is not None:
        entry["default_us"] = round(base.time_us, 2)
    return entry
