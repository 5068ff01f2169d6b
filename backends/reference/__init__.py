"""The oracle: every op in NumPy float64, written for reading; shares no helper with any kernel."""
NATIVE = "numpy"


def unavailable() -> str | None:
    return None
