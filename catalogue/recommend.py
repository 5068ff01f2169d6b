"""`sparsetile recommend`: which system to take for a length and a memory, from what was measured on this device, else from counted operations and bytes; with a reason for each.

The field's guides say: dense below 4k tokens, windows where near text is enough, global tokens where landmarks are, latents where the cache is the limit, selection where any
token may matter. Here these are what the numbers come to, by three rules:
  1. A system is out if it finds less than is asked for, goes the other way, is refused on this device, or keeps more than the memory holds.
  2. Of the rest the fastest beside dense attention is compared with the fastest that sees every key exactly.
  3. It is taken if it is at least `gain` times as fast as that one; else exactness costs little, and the exact one is.
"""
from dataclasses import dataclass, replace

from sparsetile.backends import devices
from sparsetile.backends.contract import BACKENDS
from sparsetile.catalogue import page, speed, store
from sparsetile.catalogue.entries import SYSTEMS
from sparsetile.catalogue.system import FINDS, GPU
from sparsetile.ops import checks

GUIDE = 4096  # the field's guides keep dense attention up to here


@dataclass(frozen=True)
class Need:
    """What is asked for. memory_gib: for the caches of all layers and the batch, None without a limit; find: one of FINDS, the least that will do; gain: see rule 3."""
    length: int
    memory_gib: float | None = None
    find: str = "chosen"
    training: bool = False
    both_ways: bool = False
    layers: int = 32
    batch: int = 1
    heads: int = GPU.Hq
    key_heads: int = GPU.Hk
    width: int = GPU.D
    gain: float = 1.5

    def __post_init__(self):
        for name in ("length", "layers", "batch", "heads", "key_heads", "width"):
            checks.integer(name, getattr(self, name), 1)
        checks.choice("find", self.find, tuple(FINDS))
        checks.number("memory_gib", self.memory_gib, 0, optional=True)
        checks.number("gain", self.gain, 0)
        if self.heads % self.key_heads:
            raise ValueError(f"key_heads: expected a divisor of the {self.heads} heads, got {self.key_heads}; e.g. 8 for 32")

    @property
    def shape(self):
        return replace(GPU, Hq=self.heads, Hk=self.key_heads, D=self.width, B=self.batch)


def recommend(need: Need, device: int | None = None, data: dict | None = None) -> dict:
    """{system, call, basis, reasons}: system is None where nothing fits; reasons has a sentence for every system. data: measurements instead of this device's own."""
    data, reasons, left = store.of(device) if data is None else data, {}, {}
    for system in SYSTEMS:
        why = _out(system, need, device)
        factor, how = (None, None) if why else _factor(system, need, data)
        if why or factor is None:
            reasons[system.name] = why or how
        else:
            left[system.name] = factor
            reasons[system.name] = f"{how}; {_keeps(system, need)}"
    taken, last = _taken(left, need, data is not None)
    found = next((system for system in SYSTEMS if system.name == taken), None)
    return {"system": taken, "call": found and found.call, "trained": found and found.trained, "because": last, "basis": _basis(need, data, device), "reasons": reasons}


def _taken(left: dict, need: Need, measured: bool):
    """Rules 2 and 3. What was only counted is not called fast."""
    if not left:
        return None, "nothing fits: give more memory or fewer layers at once, or ask to find less"
    fastest = max(left, key=left.get)
    exact = max((name for name in left if next(s for s in SYSTEMS if s.name == name).finds == "all"), key=left.get, default=None)
    guide = f"The field's guides say dense up to {GUIDE:,} tokens" + (", and so do the numbers" if need.length <= GUIDE and fastest == exact else "") + "."
    if exact is None or fastest == exact:
        return fastest, f"it {'is the fastest' if measured else 'counts the fewest operations of those'} that {'fits' if measured else 'fit'}. {guide}"
    ratio, words = left[fastest] / left[exact], ("is {:.2f} x as fast as", "fastest") if measured else ("counts {:.2f} x fewer operations than", "least")
    compared = f"{words[0].format(ratio)} {exact}, the {words[1]} exact one that fits"
    if ratio < need.gain:
        return exact, f"{fastest} {compared}: less than the {need.gain:g} x that giving up exactness should bring. {guide}"
    return fastest, f"it {compared}. {guide}"


def _out(system, need, device) -> str | None:
    """Rule 1: why a system is out."""
    order = list(FINDS)
    if system.refusal:
        return f"out of scope: {system.refusal}"
    if need.find != "gist" and order.index(system.finds) > order.index(need.find):
        return f"it finds {FINDS[system.finds]}; asked for: {FINDS[need.find]}"
    if need.both_ways and system.causal and system.family not in ("dense", "latent"):
        return "it is causal"
    if not need.both_ways and not system.causal:
        return "it goes both ways, as its paper has it, and the sequence is causal"
    if system.works(device):
        return system.works(device)
    for kernels in (system.kernels, *[system.backward] * need.training):
        answers = {name: page.runs(kernels, name) for name in (BACKENDS[:2] if device is not None else ("numba",))} if kernels else {}
        if answers and not any(page.is_types(answer) for answer in answers.values()):
            return "; ".join(answers.values())
    if need.memory_gib is not None and _bytes(system, need) > need.memory_gib * 2 ** 30:
        return f"{_keeps(system, need)}, more than the {need.memory_gib:g} GiB there are"
    return None


def _bytes(system, need) -> int:
    return system.cache(need.shape, need.length) * need.layers * need.batch


def _keeps(system, need) -> str:
    return f"its caches keep {_bytes(system, need) / 2 ** 30:.3g} GiB"


def _factor(system, need, data):
    """(times as fast as dense, how that is known); (None, why not) where this device was measured and the system was not."""
    if data is None:
        base = next(s for s in SYSTEMS if s.name == "gqa").operations(need.shape, need.length)
        share = system.operations(need.shape, need.length) / base
        return 1 / share, f"{share:.3g} of dense attention's operations, counted"
    what = speed.PASSES[need.training]
    row = store.row(data, system.name, need.length, what)
    if row is None:
        return None, f"not measured on {data['device']['name']}: run sparsetile catalogue --measure"
    if store.why_not(row):
        return None, f"not measured at {row['tokens']:,} tokens: {store.why_not(row)}"
    by = f" by {row['backend']}" if row.get("backend") else ""
    return row["times_dense"], f"{row['times_dense']:.2f} x as fast as dense at {row['tokens']:,} tokens ({what}, measured{by})"


def _basis(need, data, device) -> str:
    if data is None:
        return f"counted operations and bytes only: nothing was measured on {devices.device_info(device).name}; run sparsetile catalogue --measure"
    shape = data["shape"]
    heads = f"Hq {shape['Hq']}, Hk {shape['Hk']}, D {shape['D']}, {shape['dtype']}"
    return f"measured on {data['device']['name']} with {heads}, at the longest measured length up to {need.length:,}; bytes counted for your heads"


def text(answer: dict) -> str:
    lines = [f"take {answer['system']}: {answer['call']}" if answer["system"] else "nothing fits", f"  because {answer['because']}", f"  by {answer['basis']}"]
    if answer["system"]:
        lines.append(f"  trained: {answer['trained']}")
    return "\n".join([*lines, "", *(f"  {name:28}{sentence}" for name, sentence in answer["reasons"].items())])
