"""The catalogue: every system of the literature that runs here, in one table; what it costs, measured and counted; which one to take. `sparsetile catalogue`, `recommend` and `plan`."""
