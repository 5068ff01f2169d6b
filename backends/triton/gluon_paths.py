"""Where a path that is written in Gluon runs: with which Triton, on which chips."""
import triton

WRITTEN_FOR = "3.6"  # Gluon's names, and how a compiled kernel is called (relaunch.py), change from version to version


def known_triton() -> bool:
    return triton.__version__.split(".")[:2] == WRITTEN_FOR.split(".")


def lacking(problem, path: str = "gluon", instead: str = "portable") -> str | None:
    """What the path wants and is not there, whatever the problem's shape."""
    if problem.arch != "sm_90a":
        return f"path {path}: {problem.arch} lacks its instructions; take {instead}"
    if not known_triton():
        return f"path {path} is written for Triton {WRITTEN_FOR}, not {triton.__version__}; take {instead}"
    return None
