"""One checked call of sparse_attention, the choice made for it, and the lists of its pattern."""
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

from sparsetile.backends import arrays, devices
from sparsetile.backends.contract import Lists, Problem, density_bucket
from sparsetile.ops import dispatch
from sparsetile.ops.layout import Layout
from sparsetile.ops.lowering import lower
from sparsetile.ops.patterns import Full, Pattern, PerHead
from sparsetile.ops.selection import Selection

OP = "sparse_attention"


@dataclass(frozen=True)
class Call:
    """One checked call of sparse_attention. q_start None means kv_length - T."""
    q: Any
    k: Any
    v: Any
    rule: Any
    scale: float
    sink_logits: Any
    softcap: float | None
    kv_length: Any
    q_start: Any
    value_width: int
    deterministic: bool
    backend: str | None
    config: Any
    caller: str
    device: int | None
    table: Any = None  # [B,pages] int32: k and v are pages [N,Hk,page,width] of a cache
    latent: Any = None  # (R, P): rows of k are bytes, the fp8 layout of a latent cache
    scales: tuple = (None, None, None)  # q_scale, k_scale, v_scale of float8 operands
    out_dtype: str | None = None  # where it is not q's own: of float8 queries

    @property
    def sizes(self):
        """B, Hq, Hk, T, S, D, Dv"""
        (B, Hq, T, D), (_, Hk, S, _) = self.q.shape, self.k.shape
        return B, Hq, Hk, T, S if self.table is None else S * self.table.shape[1], D, self.value_width

    @property
    def out_kind(self) -> str:
        return self.out_dtype or arrays.dtype_name(self.q)

    @property
    def scaled(self) -> bool:
        return any(x is not None for x in self.scales)

    @property
    def arrays(self):
        return self.q, self.k, self.v, self.sink_logits


# ------------------------------------------------------------------------------------------------------------------- problem
def features_of(call: Call, gradient: bool, lse: bool) -> list[str]:
    rule = call.rule
    words = [("sink", call.sink_logits is not None), ("softcap", call.softcap is not None), ("kv_length", call.kv_length is not None), ("lse", lse),
             ("gradient", gradient), ("shared_kv", call.v is None), ("q_start", call.q_start is not None and not isinstance(call.q_start, int)),
             ("causal", isinstance(rule, Selection) and rule.causal), ("per_head", isinstance(rule, PerHead) or isinstance(rule, Selection) and call.q.shape[1] == rule.indices.shape[1] > call.k.shape[1]), ("layout", isinstance(rule, Layout)), ("paged", call.table is not None),
             ("scale", call.scaled)]
    return [word for word, on in words if on]


def problem_of(call: Call, name: str, gradient=False, lse=False) -> Problem:
    B, Hq, Hk, T, S, D, Dv = call.sizes
    dims = dict(B=B, Hq=Hq, Hk=Hk, T=T, S=S, D=D, Dv=Dv)
    rule, density, granularity = call.rule, 1.0, 1
    if isinstance(rule, Selection):
        dims["K"], granularity = rule.indices.shape[3], rule.granularity
    elif isinstance(rule, Pattern) and T and S and isinstance(call.q_start, int):
        density = density_bucket(rule.density(T, S, q_start=call.q_start))
    kind = arrays.dtype_name(call.q)
    keys = arrays.dtype_name(call.k) if call.latent is None else "latent_fp8"
    features = features_of(call, gradient, lse)
    if isinstance(rule, Pattern):
        features += ["dense"] if rule == Full() else ["static", rule.kind]
    return Problem.of(name, dims, dict(q=kind, k=keys, v=keys), devices.device_info(call.device).arch, features, density, granularity)


_choices = OrderedDict()
dispatch.PLAN_CACHES.append(_choices)


def choose(call: Call, name: str, gradient=False, lse=False) -> dispatch.Choice:
    """The cached choice for the call's shapes, pattern and environment."""
    rule = call.rule
    if isinstance(rule, Selection):
        rule_key = rule.indices.shape, rule.granularity, rule.causal, rule.lengths is None
    else:
        rule_key = rule if isinstance(rule, Pattern) else (id(type(rule)), rule.block_q, rule.block_k)
    start = call.q_start if isinstance(call.q_start, int) else None if call.q_start is None else "device"
    config = None if call.config is None else tuple(sorted(call.config.items()))
    key = (name, call.sizes, arrays.dtype_name(call.q), arrays.dtype_name(call.k), call.scaled, call.device, rule_key, start, call.kv_length is None, call.sink_logits is None, call.softcap is None,
           gradient, lse, call.v is None, call.table is None, call.latent, call.backend, config, dispatch.environment(OP))
    if not dispatch.is_explaining() and key in _choices:
        _choices.move_to_end(key)
        return _choices[key]
    fixed = {"block_q": rule.block_q, "block_k": rule.block_k} if isinstance(rule, Layout) else None
    choice = dispatch.choose(OP, problem_of(call, name, gradient, lse), call.device, call.backend, call.config, fixed, rule if isinstance(rule, Pattern) else None)
    _remember(_choices, key, choice, 1024)
    return choice


def _remember(cache: OrderedDict, key, value, most: int):
    cache[key] = value
    if len(cache) > most:
        cache.popitem(last=False)


# --------------------------------------------------------------------------------------------------------------------- lists
_lists = OrderedDict()
dispatch.PLAN_CACHES.append(_lists)
ARRAYS = ("offsets", "cols", "kinds", "by_key_offsets", "by_key_rows", "by_key_kinds", "intervals", "bitmaps", "list_of", "q_order", "k_order")


def lists_for(call: Call, config: dict, place) -> tuple[Lists, ...]:
    """The parts of the call's pattern or layout as native arrays of the place; static ones are made once and kept."""
    rule, native = call.rule, type(place).__name__
    if isinstance(rule, Layout):
        return rule.on((native, place.device, place.caller), lambda part: _carry(part, place))
    B, Hq, _, T, S, _, _ = call.sizes
    block_q, block_k = config["block_q"], config["block_k"]
    if isinstance(call.q_start, int):
        first, last, capacity = call.q_start, call.q_start + T, S
        if T <= 64:  # decoding: the same lists serve a whole block of positions and a growing cache
            first, last = first // block_q * block_q, -(-last // block_q) * block_q
            step = 1 if rule.needs_exact_S else max(256, 1 << max(0, S.bit_length() - 4))
            capacity = -(-S // step) * step
    else:  # positions are known on the device only
        first, last, capacity = -T, rule.extent(S) + (0 if call.q_start is None else T), S
    key = (rule, first, last, capacity, block_q, block_k, Hq, native, place.device, place.caller)
    parts = _lists.get(key)
    if parts is None:
        parts = tuple(_carry(part, place) for part in lower(rule, first, last, capacity, block_q, block_k, Hq))
        _remember(_lists, key, parts, 256)
    else:
        _lists.move_to_end(key)
    return parts


def _carry(part: Lists, place) -> Lists:
    """A part's arrays on the place: uploaded once if they are host arrays, by their pointers if they are on its device."""
    def one(x):
        if x is None:
            return None
        return place.upload(arrays.as_numpy(x)) if arrays.device_of(x) is None else place.native(x)
    known = ("offsets", "cols", "kinds", "intervals", "bitmaps", "by_key_offsets", "by_key_rows", "q_order", "k_order") if arrays.device_of(part.offsets) is None else ()
    host = {name: arrays.as_numpy(getattr(part, name)) for name in known if getattr(part, name) is not None}
    return replace(part, **{name: one(getattr(part, name)) for name in ARRAYS}, extras=host)
