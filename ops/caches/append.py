"""New rows of a cache, quantised and scattered in one pass: the choice of the kernel `append` (backends/reference/append.py says what it does)."""
from sparsetile.backends import arrays, devices, places
from sparsetile.backends.contract import Problem
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks, dispatch


def append(form, rows, pools, table, lengths, *, page_size, counts=None, ring=None, power_of_two=False, backend=None, config=None) -> None:
    """Write rows [B,n,...] at positions lengths[b] + i through the page table [B,pages] into the pools, in place; then lengths += n, or the counts, clamped to 0 .. n.

    form   "copy": row i of rows[x] [B,n,H,C] into pools[x] [N,page,H,C] of the same type, for any number of pairs;
           "latent_fp8": rows (latent [B,n,R], rotary part [B,n,P]) into pools ([N,page,R + R/32 + 2P] bytes,);
           "indexer_fp8": rows (keys [B,n,D],) into pools ([N,page * (D + 4)] bytes,), planar within a page
    counts [B] int32: rows at or past it are not written; ring (pinned, window): position p stands in slot p, or pinned + (p - pinned) % window
    """
    B, n = rows[0].shape[:2]
    checks.lengths("counts", counts, (B,), "[B]")
    named = {f"rows[{x}]": row for x, row in enumerate(rows)} | {f"pools[{x}]": pool for x, pool in enumerate(pools)}
    caller, device = checks.together(named | dict(page_table=table, lengths=lengths, counts=counts))
    kinds = dict(rows=arrays.dtype_name(rows[0]), pool=arrays.dtype_name(pools[0]))
    features = [form, *(["ring"] if ring else []), *(["power_of_two"] if power_of_two else [])]
    problem = Problem.of("append", dict(B=B, T=n, D=rows[0].shape[-1]), kinds, devices.device_info(device).arch, features)
    choice = dispatch.choose("append", problem, device, backend, config)
    place = places.place_for(dispatch.package(choice.backend).NATIVE, caller, device)
    with place.guard():
        if B * n:
            choice.kernel.run(tuple(map(place.native, rows)), tuple(map(place.native, pools)), place.native(table), place.native(lengths), place=place, config=choice.config,
                              form=form, page_size=page_size, counts=None if counts is None else place.native(counts), ring=ring, power_of_two=power_of_two)
    lengths += n if counts is None else xp.module(counts).clip(counts, 0, n)
