"""What every test shares: where modules are found, seeds, and which backends a test is run on."""
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

MARKS = {"interp": "runs the Triton kernels, in the interpreter when TRITON_INTERPRET=1: tiny sizes",
         "gpu": "needs a GPU", "slow": "takes minutes; not in the default command", "aot": "compiles GPU kernels ahead of time, without a GPU"}


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="added to the hash of the test's id")
    parser.addoption("--shard", default="1/1", help="I/N: only the tests of part I of N, by the hash of their ids")
    parser.addoption("--backends", default="", help="comma separated; only these backends, of those that are available")


def pytest_configure(config):
    for name, what in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {what}")
    if os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on"):
        from importlib.util import find_spec
        if find_spec("triton"):
            import interp_shim
            interp_shim.apply()


@pytest.fixture
def rng(request):
    """A generator of the test's own: option + hash of the test's id, so that adding a test changes no other's inputs."""
    return np.random.default_rng(request.config.getoption("--seed") + zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def on(request):
    """Where a test parametrised by `backend` runs: skips with the backend's own reason, from nothing else."""
    from drivers import Driver
    name = request.getfixturevalue("backend")
    wanted = request.config.getoption("--backends")
    if wanted and name not in wanted.split(","):
        pytest.skip(f"{name}: not among --backends={wanted}")
    driver = Driver(name)
    if driver.unavailable:
        pytest.skip(f"{name}: {driver.unavailable}")
    return driver


def pytest_runtest_logreport(report):
    """With many workers names come only at the end: a run that is cut off must have said what failed."""
    if report.failed and hasattr(report, "node"):
        print(f"\nfailed: {report.nodeid} ({report.when})", flush=True)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """A kernel that faults takes its process's CUDA context along, and every later test there would fail too. Such a worker ends instead: xdist says which test it was and starts another."""
    yield
    torch = sys.modules.get("torch")
    if not hasattr(item.config, "workerinput") or torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"\nthe context is lost after {item.nodeid}: {str(error).splitlines()[0]}", file=sys.__stderr__, flush=True)
        os._exit(70)


def pytest_collection_modifyitems(config, items):
    """--shard keeps its part. `-m interp` in a process with TRITON_INTERPRET=1 takes the Triton cases alone; numpy's warnings about inf and nan in them say nothing."""
    part, of = map(int, config.getoption("--shard").split("/"))
    if not 1 <= part <= of:
        raise pytest.UsageError(f"--shard: expected I/N with 1 <= I <= N, got {part}/{of}")
    others = [item for item in items if zlib.crc32(item.nodeid.encode()) % of != part - 1]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % of == part - 1]
    if os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on"):
        for item in items:
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
