"""Whole systems of the literature as compositions of the ops: a selector that looks at content, then sparse_attention over what it chose. No kernel lives here.

One file a system, with one face: `system(q, k, v, *, <the paper's knobs>, kv_length, q_start, backend, **options) -> out [, lse]` takes what sparse_attention takes, so that one
system is swapped for another in one line; where a system is a single choice of keys, `system_selection(q, k, *, <the same knobs>)` returns it alone, as the `pattern=` of
sparse_attention. Choosing is not differentiable, attention over what was chosen is.
"""
