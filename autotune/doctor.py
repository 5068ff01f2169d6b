"""`sparsetile doctor`: what this machine has, what runs, why the rest does not, and which profiles are found."""
import os
import platform
import shutil
import subprocess
import sys
from functools import partial
from importlib import metadata
from importlib.util import find_spec

from sparsetile.autotune import hook, shelf
from sparsetile.backends import devices
from sparsetile.backends.contract import KERNELS
from sparsetile.ops import dispatch
from sparsetile.profiles import lookup, schema

PACKAGES = ("sparsetile", "numpy", "ml_dtypes", "numba", "torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "jax", "optuna", "rich", "matplotlib", "transformers")


def report() -> dict:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    indices = [None] + list(range(_gpus()))
    return {
        "python": platform.python_version(), "platform": platform.platform(), "versions": versions,
        "devices": [{"index": d, "name": i.name, "arch": i.arch, "units": i.sms, "memory_gb": i.memory_gb, **_state(d)} for d in indices for i in (devices.device_info(d),)],
        "backends": dispatch.backends(),
        "environment": {name: os.environ.get(name) for name in (*dispatch.VARIABLES, *sorted(n for n in os.environ if n.startswith("SPARSETILE_") and n not in dispatch.VARIABLES))},
        "mistakes": _mistakes(),
        "profiles": [_profile(path) for root in _roots() for path in sorted(root.glob("*/*.yaml"))],
    }


def _mistakes() -> list:
    """What the environment says that no call can obey, one sentence each."""
    found, ops = [], dict.fromkeys(map(dispatch.op_of, KERNELS))
    for check in (dispatch.tune_mode, hook.seconds, *(partial(dispatch.requested_backend, op, None) for op in ops)):
        try:
            check()
        except ValueError as error:
            found.append(str(error))
    prefix, user = "SPARSETILE_BACKEND_", os.environ.get("SPARSETILE_PROFILE_DIR")
    for name in sorted(name for name in os.environ if name.startswith(prefix) and name[len(prefix):].lower() not in ops):
        kernel = name[len(prefix):].lower()
        remedy = f"of this kernel {prefix}{dispatch.op_of(kernel).upper()} is read" if kernel in KERNELS else "no call reads it"
        found.append(f"{name}: expected the name of an op behind {prefix}, got {name[len(prefix):]}; {remedy}")
    found += [f"SPARSETILE_PROFILE_DIR: expected a directory, got {user!r}; make it, or unset the variable"] * bool(user and not os.path.isdir(user))
    return list(dict.fromkeys(found))


def _gpus() -> int:
    if find_spec("torch"):
        import torch
        if torch.cuda.is_available():
            return torch.cuda.device_count()
    if find_spec("cupy"):
        import cupy
        return cupy.cuda.runtime.getDeviceCount() if cupy.cuda.is_available() else 0
    return 0


def _state(index) -> dict:
    """What the driver's tool says of a GPU now: clock, temperature, what slows it, ECC, and how many processes compute on it. Empty where the tool is not there."""
    if index is None or shutil.which("nvidia-smi") is None:
        return {}
    fields = "clocks.sm,clocks.max.sm,temperature.gpu,clocks_event_reasons.active,ecc.mode.current"
    ask = lambda *query: subprocess.run(["nvidia-smi", f"--id={_physical(index)}", *query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20)
    try:
        found, others = ask(f"--query-gpu={fields}"), ask("--query-compute-apps=pid")
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [word.strip() for word in found.stdout.split(",")]
    if found.returncode or len(values) != 5:
        return {}
    return dict(zip(("clock_mhz", "most_mhz", "celsius", "slowed_by", "ecc"), values)) | {"processes": len(others.stdout.split())}


def busy(index) -> str | None:
    """A sentence for who is about to time calls on a GPU that others use."""
    count = _state(index).get("processes")
    return f"{count} processes compute on GPU {index} already: what they take is in the times, and more configs tie; better times come when it is idle" if count else None


def _physical(index: int) -> str:
    """The driver's name of what this process calls GPU `index`."""
    visible = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    return visible[index] if index < len(visible) else str(index)


def _roots():
    from pathlib import Path
    user = os.environ.get("SPARSETILE_PROFILE_DIR")
    return ([Path(user)] if user else []) + [lookup.user_cache(), lookup.SHIPPED]


def _profile(path) -> dict:
    try:
        data = schema.load(path)
    except schema.ProfileError as error:
        return {"path": str(path), "error": str(error)}
    fits = [d for d in [None] + list(range(_gpus())) if devices.device_info(d).arch == data["device"]["arch"]]
    stale = sum(bool(shelf.stale(data["op"], e)) for e in data["entries"])
    return {"path": str(path), "op": data["op"], "device": data["device"]["name"], "entries": len(data["entries"]), "stale": stale, "used_here": bool(fits)}


def text(r: dict) -> str:
    lines = [f"Python {r['python']} on {r['platform']} ({sys.executable})", "", "packages"]
    lines += [f"  {name:14} {version or 'not installed'}" for name, version in r["versions"].items()]
    lines += ["", "devices"] + [f"  {'cpu' if d['index'] is None else d['index']}  {d['name']} ({d['arch']}, {d['units']} {'cores' if d['index'] is None else 'SMs'})" + _now(d) for d in r["devices"]]
    lines += ["", "backends"] + [f"  {name:10} {'runs' if why is None else 'does not run: ' + why}" for name, why in r["backends"].items()]
    lines += ["", "environment"] + [f"  {name} = {value if value else '(unset)'}" for name, value in r["environment"].items()] + [f"  {sentence}" for sentence in r["mistakes"]]
    lines += ["", "profiles"] + ([_line(p) for p in r["profiles"]] or ["  none; run `sparsetile tune`"])
    return "\n".join(lines)


def _now(d: dict) -> str:
    if "clock_mhz" not in d:
        return ""
    slowed = f", slowed by {d['slowed_by']}" if d["slowed_by"].startswith("0x") and int(d["slowed_by"], 16) > 1 else ""  # 1: it is idle
    return f", {d['clock_mhz']} of {d['most_mhz']} MHz, {d['celsius']} C{slowed}, ECC {d['ecc'].lower()}, {d['processes']} processes compute on it"


def _line(p: dict) -> str:
    if "error" in p:
        return f"  {p['path']}: {p['error']}"
    changed = f", {p['stale']} of kernels that have changed since (sparsetile tune --missing)" if p["stale"] else ""
    return f"  {p['path']}: {p['op']}, {p['entries']} {'entry' if p['entries'] == 1 else 'entries'}{changed}, {p['device']}{'' if p['used_here'] else ' (not used here)'}"
