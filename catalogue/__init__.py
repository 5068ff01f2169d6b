"""The catalogue: every system of the literature that runs here, in one table; what it costs, measured and counted; which one to take.

`sparsetile catalogue`, `sparsetile recommend` and `sparsetile plan`.
"""
