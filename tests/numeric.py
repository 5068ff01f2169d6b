"""The numeric policy and the plain formulas as tests take them. They live in autotune/ because the tuner judges by the same ones."""
from sparsetile.autotune import plain  # noqa: F401
from sparsetile.autotune.numeric import EPS, FACTOR, assert_chosen, assert_close, assert_same_bits, assert_topk, to_numpy  # noqa: F401
