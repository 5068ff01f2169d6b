"""`sparsetile doctor`: what this machine has, what runs, why the rest does not, and which profiles are found."""
import os
import platform
import sys
from importlib import metadata
from importlib.util import find_spec

from sparsetile.backends import arrays
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
    devices = [None] + list(range(_gpus()))
    return {
        "python": platform.python_version(), "platform": platform.platform(), "versions": versions,
        "devices": [{"index": d, "name": i.name, "arch": i.arch, "units": i.sms, "memory_gb": i.memory_gb} for d in devices for i in (arrays.device_info(d),)],
        "backends": dispatch.backends(),
        "environment": {name: os.environ.get(name) for name in dispatch.VARIABLES},
        "profiles": [_profile(path) for root in _roots() for path in sorted(root.glob("*/*.yaml"))],
    }


def _gpus() -> int:
    if find_spec("torch"):
        import torch
        if torch.cuda.is_available():
            return torch.cuda.device_count()
    if find_spec("cupy"):
        import cupy
        return cupy.cuda.runtime.getDeviceCount() if cupy.cuda.is_available() else 0
    return 0


def _roots():
    from pathlib import Path
    user = os.environ.get("SPARSETILE_PROFILE_DIR")
    return ([Path(user)] if user else []) + [lookup.user_cache(), lookup.SHIPPED]


def _profile(path) -> dict:
    try:
        data = schema.load(path)
    except schema.ProfileError as error:
        return {"path": str(path), "error": str(error)}
    fits = [d for d in [None] + list(range(_gpus())) if arrays.device_info(d).arch == data["device"]["arch"]]
    return {"path": str(path), "op": data["op"], "device": data["device"]["name"], "entries": len(data["entries"]), "used_here": bool(fits)}


def text(r: dict) -> str:
    lines = [f"Python {r['python']} on {r['platform']} ({sys.executable})", "", "packages"]
    lines += [f"  {name:14} {version or 'not installed'}" for name, version in r["versions"].items()]
    lines += ["", "devices"] + [f"  {'cpu' if d['index'] is None else d['index']}  {d['name']} ({d['arch']}, {d['units']} {'cores' if d['index'] is None else 'SMs'})" for d in r["devices"]]
    lines += ["", "backends"] + [f"  {name:10} {'runs' if why is None else 'does not run: ' + why}" for name, why in r["backends"].items()]
    lines += ["", "environment"] + [f"  {name} = {value if value else '(unset)'}" for name, value in r["environment"].items()]
    lines += ["", "profiles"] + ([f"  {p['path']}: " + (p["error"] if "error" in p else f"{p['op']}, {p['entries']} entries, {p['device']}{'' if p['used_here'] else ' (not used here)'}")
                                  for p in r["profiles"]] or ["  none; run `sparsetile tune`"])
    return "\n".join(lines)
