"""Which mode latent attention takes where it is left to choose: absorbed or decompressed, by a profile's word or by a count of operations and bytes."""
from functools import lru_cache

from sparsetile.backends import arrays, devices
from sparsetile.backends.contract import Problem, density_bucket
from sparsetile.ops import dispatch
from sparsetile.ops.pattern import Pattern
from sparsetile.ops.selection import Selection

MODES = ("absorbed", "decompressed")
WIDEST = 576  # R + P of the absorbed mode at most
MOST_REBUILT = 4 << 30  # bytes of keys and values that "auto" makes of a cache, which is there to save them
STEP = 64  # queries of a decoding step, which graphs record, at most: a call that warms up and the one that is recorded must take one mode
_modes = {}
dispatch.PLAN_CACHES.append(_modes)


def of_cache(cache, rule, T, sizes, kind, device, backend, caller) -> str:
    """The mode that "auto" means over a cache, by the tokens that it holds. sizes: B, S, H, R, Dn, Dv, P, of which S is not looked at."""
    B, _, H, R, Dn, Dv, P = sizes
    fits = T > STEP and R + P <= WIDEST and _in_one_piece(cache, rule, caller) and B * H * cache.held() * (Dn + P + Dv) * arrays.ITEMSIZE[kind] <= MOST_REBUILT
    return of(rule, T, (B, pow2_up(cache.held()), *sizes[2:]), kind, device, backend, caller) if fits else "absorbed"


def of(rule, T, sizes, kind, device, backend, caller) -> str:
    """The mode that "auto" means for arrays. A Selection is known by how many keys it gives at most, a pattern by what it is; a layout counts as dense. torch.compile asks with every length as a
    profile's keys have it: a graph that serves many lengths cannot have a mode for each. Between two powers of two the eager call may therefore take the other mode."""
    rule = rule.indices.shape[3] * rule.granularity if isinstance(rule, Selection) else rule if isinstance(rule, Pattern) else None
    if caller == "torch":
        import torch
        if torch.compiler.is_compiling():
            from sparsetile.ops import torch_ops
            text, (B, S, *widths) = rule.canonical() if isinstance(rule, Pattern) else rule, sizes
            return torch_ops.latent_mode(text, pow2_up(T), pow2_up(B), pow2_up(S), *widths, kind, device, backend)
    return known(rule, T, sizes, kind, device, backend)


def of_any_length(pattern) -> bool:
    """Whether a rule means the same for a cache's capacity as for the keys that it holds."""
    return pattern is None or isinstance(pattern, Selection) or isinstance(pattern, Pattern) and not pattern.needs_exact_S


def _in_one_piece(cache, pattern, caller) -> bool:
    """Whether a cache may be rebuilt without being asked to."""
    if caller == "torch":
        import torch
        if torch.compiler.is_compiling() or cache.lengths.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
    return cache.book is not None and of_any_length(pattern) and caller != "cupy"  # which cannot ask CuPy's streams


def pow2_up(n) -> int:
    """A length as a profile's keys have it. Written so that torch.compile, which may know it as a symbol, is told no more than that."""
    power = 1
    while power < n:
        power *= 2
    return power


def known(rule, T, sizes, kind, device, backend) -> str:
    """What a profile says, else the cheaper mode by latent_cost. rule: a pattern, so many keys of each query, or None for all."""
    key = rule, T, sizes, kind, device, backend, dispatch.environment("latent_attention")
    if key not in _modes:
        if len(_modes) >= 1024:  # shapes come and go
            _modes.clear()
        _modes[key] = decide(rule, T, sizes, kind, device, backend)
    return _modes[key]


def decide(rule, T, sizes, kind, device, backend) -> str:
    B, S, H, R, Dn, Dv, P = sizes
    pairs = T * S if rule is None or not T * S else T * min(S, rule) if isinstance(rule, int) else _pairs(rule, T, S)
    problem = Problem.of("latent_attention", dict(B=B, H=H, T=T, S=S, R=R, Dn=Dn, Dv=Dv, P=P), dict(latent=kind), devices.device_info(device).arch,
                         ["selection"] * isinstance(rule, int), density_bucket(pairs / max(1, T * S)))
    asked = dispatch.requested_backend("latent_attention", backend)
    found = None if dispatch.tune_mode() == "off" else dispatch.looked_up(problem, device, None if asked == "auto" else asked)
    if found is not None and found.config.get("mode") in MODES:
        return found.config["mode"]
    cost = latent_cost(T, S, H, R, Dn, Dv, P, pairs)
    return "absorbed" if cost["absorbed"]["seconds"] <= cost["decompressed"]["seconds"] else "decompressed"


@lru_cache(1024)
def _pairs(pattern, T, S) -> int:
    """Counted once: it costs the host more than all else in a call, 0.2 ms for causal 2048 x 2048."""
    return int(T * S * pattern.density(T, S))


def latent_cost(T, S, H, R, Dn, Dv, P, pairs=None) -> dict:
    """Operations and bytes (16-bit elements) of both modes of latent attention, and seconds on a device of 790 TFLOP/s and 4.3 TB/s per batch entry.

    absorbed:     2 T H R (Dn + Dv) for the two products, 2 pairs (2 R + P) per head; reads the latent once per query tile of 64 rows of all heads
    decompressed: 2 S H R (Dn + Dv) to rebuild, 2 pairs (Dn + P + Dv) per head; writes and reads keys and values once

    There is no third mode that feeds rebuilt tiles to attention without writing them. At DeepSeek's widths a key of a head costs 262144 operations to rebuild, 0.33 ns, and 1280 bytes to
    write and read, 0.30 ns: rebuilt for every 128 queries it costs three times what attention over it does. With one tile of queries absorbed is cheaper (up to T = 171), with two in a
    cluster the weights of a head, 262 KB, do not fit shared memory: read again for every 128 keys they are 2 KB a key, more than what is saved.
    """
    pairs = T * S if pairs is None else pairs
    absorbed = 2 * T * H * R * (Dn + Dv) + 2 * pairs * H * (2 * R + P), 2 * S * (R + P) * max(1, T * H // 4096) + 4 * T * H * (R + P)
    rebuilt = 2 * S * H * R * (Dn + Dv) + 2 * pairs * H * (Dn + P + Dv), 2 * S * (R + P) + 4 * S * H * (Dn + P + Dv)
    return {name: dict(flops=flops, bytes=size, seconds=max(flops / 790e12, size / 4.3e12)) for name, (flops, size) in
            dict(absorbed=absorbed, decompressed=rebuilt).items()}
