"""A test report short enough to commit: python -m sparsetile.ci.report part.xml ... > bench/results/<gpu>-tests.txt

Reads pytest's JUnit files (parts of one suite), prints where they ran (the suite's name, as `--machine` gives it to ci/gpu.sh), the counts of each file, every failure with its first line, and each reason for skipping with its count.
"""
import re
import sys
import xml.etree.ElementTree as tree
from collections import Counter

from sparsetile.autotune import provenance


def machine() -> str:
    """The device and the versions, of those packages that are here."""
    from importlib import metadata
    words = [f"python {sys.version.split()[0]}"]
    for name in ("torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "numba", "numpy"):
        try:
            words.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    try:
        import torch
        words.insert(0, torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU")
    except ImportError:
        words.insert(0, "no torch")
    return ", ".join([*words, f"commit {provenance.commit()}"])


def outcome(case) -> tuple[str, str]:
    """passed, failed, error or skipped, and the first line of why."""
    for kind in ("failure", "error", "skipped"):
        node = case.find(kind)
        if node is not None:
            text = (node.get("message") or node.text or "").strip()
            return {"failure": "failed"}.get(kind, kind), text.splitlines()[0] if text else ""
    return "passed", ""


def summary(paths: list[str]) -> str:
    counts, reasons, failures, seconds, where = {}, Counter(), [], 0.0, {}
    for path in paths:
        for suite in tree.parse(path).getroot().iter("testsuite"):
            where[suite.get("name") or "?"] = None
            seconds += float(suite.get("time") or 0)
            for case in suite.iter("testcase"):
                kind, why = outcome(case)
                file = re.sub(r"^tests[./]", "", case.get("classname") or "?").partition(".Test")[0]
                counts.setdefault(file, Counter())[kind] += 1
                if kind == "skipped":
                    reasons[re.sub(r"\d+", "#", why)[:140]] += 1
                elif kind != "passed":
                    failures.append(f"{kind} {file}::{case.get('name')}: {why[:200]}")
    total = sum(counts.values(), Counter())
    shown = lambda count: ", ".join(f"{count[kind]} {kind}" for kind in ("passed", "failed", "error", "skipped") if count[kind]) or "none"
    lines = [*where, f"{shown(total)} in {len(paths)} part{'s' * (len(paths) > 1)}, {seconds:.0f} s of processes' time"]
    lines += [f"  {file:32} {shown(count)}" for file, count in sorted(counts.items())]
    lines += ["not passed:"] + [f"  {line}" for line in failures] if failures else []
    lines += ["skipped because (numbers as #):"] + [f"  {count:5} {why}" for why, count in reasons.most_common()] if reasons else []
    return "\n".join(lines)


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    if paths == ["--machine"]:
        print(machine())
        return 0
    text = summary(paths)
    print(text)
    return 1 if "\nnot passed:" in text else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
