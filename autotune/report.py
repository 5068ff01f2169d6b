"""`sparsetile report`: one HTML page for each profile, without scripts or anything from elsewhere: tuned against default, and the course of the search where a storage knows it."""
import html
import json
from pathlib import Path

from sparsetile.autotune import measure, search, shelf, tasks
from sparsetile.profiles import schema

CEILINGS = {"NVIDIA H100 80GB HBM3": (989.4, 3.35), "NVIDIA H200": (989.4, 4.8), "NVIDIA A100-SXM4-80GB": (312.0, 2.039)}  # data sheets: dense 16-bit TFLOP/s, TB/s
STYLE = "body{font:14px sans-serif;margin:2em;max-width:70em}table{border-collapse:collapse}td,th{padding:.2em .6em;text-align:left;border-bottom:1px solid #ddd}svg{background:#f8f8f8}code{font-size:12px}"


def write(path: Path, out: Path, storage=None) -> Path:
    """The page of one profile file."""
    data, trials = schema.load(path), _trials(storage)
    lines = [f"<!doctype html><meta charset=utf-8><title>{html.escape(data['op'])}</title><style>{STYLE}</style>", f"<h1>{html.escape(data['op'])} on {html.escape(data['device']['name'])}</h1>",
             f"<p>{html.escape(', '.join(f'{k} {v}' for k, v in sorted(data.get('tuned_with', {}).items())))}</p>",
             "<table><tr><th>workload<th>backend<th>tuned<th>default<th>gain<th>rate<th>of the ceiling<th>tried<th>ties<th>config</tr>"]
    for entry, row in zip(data["entries"], shelf.rows(path)):
        lines.append(_row(entry, row, data["device"]["name"]))
    lines.append("</table>")
    if data["device"]["name"] in CEILINGS:
        lines.append("<p>The ceiling is the roofline of the data sheet: {} TFLOP/s of dense 16-bit products (8-bit: twice that) or {} TB/s for what has to be read and written once, whichever takes longer.</p>"
                     .format(*CEILINGS[data["device"]["name"]]))
    for entry in data["entries"]:
        course = [t for name, found in trials.items() if f"/{entry['backend']}/" in name and f"/{entry.get('workload')}/" in name and name.startswith(data["op"] + "/") for t in found]
        if course:
            lines += [f"<h2>{html.escape(str(entry.get('workload')))}, {html.escape(entry['backend'])}</h2>", _history(course), _knobs(course)]
    out.mkdir(parents=True, exist_ok=True)
    page = out / f"{path.parent.name}-{path.stem}.html"
    page.write_text("\n".join(lines), encoding="utf-8")
    return page


def _row(entry, row, device: str) -> str:
    gain = row["default_us"] / row["time_us"] if row["default_us"] and row["time_us"] else None
    bar = "" if gain is None else f"<svg width=120 height=12><rect width={min(120, 60 * gain):.0f} height=12 fill='#4a8'/><rect x=60 width=1 height=12 fill='#444'/></svg> {gain:.3f} x"
    cells = [row["workload"] or row["key"], row["backend"], f"{row['time_us']} us", f"{row['default_us']} us", None, *_rate(entry, device), f"{entry.get('search', {}).get('evaluated', '')} of "
             f"{entry.get('search', {}).get('feasible', '')}", f"{row['ties']} within {row['band']:.1%}" if row["band"] is not None else "", json.dumps(row["config"])]
    return "<tr>" + "".join(f"<td>{bar if cell is None else html.escape(str(cell))}" for cell in cells) + "</tr>"


def _rate(entry, device: str) -> tuple[str, str]:
    """Where it stands: operations of the pairs in the pattern for each second, and the share of the roofline above it."""
    try:
        w = tasks.find(entry["workload"])
    except (KeyError, ValueError):
        return "", ""
    if w.kernel.startswith("gather") or not entry.get("time_us"):  # what it counts is in its indices
        return "", ""
    task = tasks.Task(w, None, hollow=True)
    flops = measure.operations(task)
    return f"{flops / entry['time_us'] / 1e6:.1f} TFLOP/s" if flops else "", ceiling(task, entry["time_us"], device)


def ceiling(task, time_us: float, device: str) -> str:
    """The least time by the device's roofline over the time that was taken, and which of the two roofs it is; nothing where the device's are not known."""
    if device not in CEILINGS:
        return ""
    tflops, tbs = CEILINGS[device]
    dtype, flops = task.workload.dtype, measure.operations(task)
    products = flops / (tflops * 1e6 * (2 if "float8" in dtype else 1)) if flops and dtype not in ("float32", "float64") else 0.0
    least = max((products, "products"), (measure.traffic(task) / (tbs * 1e6), "memory"))
    return f"{least[0] / time_us:.0%} ({least[1]})"


def _trials(storage) -> dict:
    if storage is None:
        return {}
    optuna, held = search.engine(), search.storage_of(storage)
    return {name: [json.loads(t.user_attrs["result"]) for t in optuna.load_study(study_name=name, storage=held).get_trials(deepcopy=False) if "result" in t.user_attrs]
            for name in optuna.study.get_all_study_names(held) if not name.startswith("sparsetile/")}


def _history(course) -> str:
    """Each trial's time and the best so far, against its number; failures stand at the top."""
    times = [t["time_us"] for t in course if t["time_us"]]
    if not times:
        return f"<p>{len(course)} trials, none right</p>"
    low, high, width = min(times), sorted(times)[int(0.9 * (len(times) - 1))] * 1.1, 700 / len(course)
    y = lambda us: 10 + 180 * (1 - (min(us, high) - low) / max(high - low, 1e-9))  # noqa: E731
    best, dots, line = float("inf"), [], []
    for n, t in enumerate(course):
        best = min(best, t["time_us"] or best)
        dots.append(f"<circle cx={n * width + 4:.1f} cy={y(t['time_us']) if t['time_us'] else 4:.1f} r=2 fill={'#369' if t['time_us'] else '#c33'} />")
        if best < float("inf"):
            line.append(f"{n * width + 4:.1f},{y(best):.1f}")
    return f"<svg width=710 height=200>{''.join(dots)}<polyline points='{' '.join(line)}' fill=none stroke='#4a8'/></svg><p>{len(course)} trials, best {low:.1f} us; red: failed</p>"


def _knobs(course) -> str:
    """How much each knob matters: the best time with each of its values."""
    right, lines = [t for t in course if t["time_us"]], []
    for knob in sorted({k for t in right for k in t["config"]}):
        values = sorted({str(t["config"].get(knob)) for t in right})
        best = {v: min(t["time_us"] for t in right if str(t["config"].get(knob)) == v) for v in values}
        lines.append((max(best.values()) / min(best.values()), f"<tr><td>{html.escape(knob)}<td>" + ", ".join(f"{html.escape(v)}: {us:.1f} us" for v, us in best.items()) + "</tr>"))
    return "<table><tr><th>knob<th>best with each value, the knob that matters most first</tr>" + "".join(text for _, text in sorted(lines, reverse=True)) + "</table>"
