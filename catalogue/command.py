"""`sparsetile catalogue`, `recommend` and `plan`: their arguments, and what they print. Everything else is imported when a command runs."""
import json
import time
from importlib import import_module
from pathlib import Path

_HERE = __name__.rpartition(".")[0]


def add(command, count, seconds, device):
    """Adds the commands. `command` makes one, the others read a whole number, seconds and a device."""
    p = command("catalogue", lambda args: _catalogue(args, device), "Every system: what a query sees, what it keeps and costs, who runs it, how fast it was, and a picture.",
                "examples:\n  sparsetile catalogue                               the table\n  sparsetile catalogue longformer                    one system, with its picture\n"
                "  sparsetile catalogue --measure --device 0          time what was not yet, beside dense attention; recommend reads it\n"
                "  sparsetile catalogue --markdown > docs/catalogue.md")
    p.add_argument("systems", nargs="*", help="names of systems (none: the table)")
    p.add_argument("--markdown", action="store_true", help="the whole page")
    p.add_argument("--measure", action="store_true", help="time the systems on this device; each row is written as it comes, and rows that the file has are not measured again")
    p.add_argument("--again", action="store_true", help="measure those too")
    p.add_argument("--device", default="cpu", help="cpu, or the index of a GPU (default: cpu)")
    p.add_argument("--tokens", type=count, nargs="+", help="lengths to measure (default: 1024 4096 on a CPU, 4096 16384 on a GPU)")
    p.add_argument("--passes", nargs="+", choices=("forward", "training"), default=("forward", "training"), help="what to measure (default: both; training is forward and backward)")
    p.add_argument("--seconds", type=seconds, default=0.3, help="time for the rounds of each system, length and pass (default: 0.3; six rounds at least, three of slow calls)")
    p.add_argument("--note", help="words about the run that the page shows, such as what else the machine did")
    p.add_argument("--commit", help="what is measured (default: git describe)")
    p.add_argument("--into", help="directory for the file (default: the user cache; catalogue/measured in a checkout ships it)")
    p.add_argument("--pictures", help="directory for a PNG of each pattern")

    p = command("recommend", lambda args: _recommend(args, device),
                "Which system to take, by this device's own measurements (else by counted operations and bytes), with a reason for each.",
                "examples:\n  sparsetile recommend --length 131072 --memory 16\n  sparsetile recommend --length 8192 --find nearby --device 0 --training\n"
                "Run `sparsetile catalogue --measure` first; without it nothing is known of this device, and the answer says so.")
    p.add_argument("--length", type=count, required=True, help="tokens of a sequence")
    p.add_argument("--memory", type=float, help="GiB for the caches of all layers (default: no limit)")
    p.add_argument("--find", default="chosen", help="the least that will do: all, chosen, landmarks, nearby or gist (default: chosen: any key may matter)")
    p.add_argument("--training", action="store_true", help="forward and backward")
    p.add_argument("--both-ways", action="store_true", help="every position sees later ones too")
    sizes = ("layers", 32, "layers"), ("batch", 1, "sequences at once"), ("heads", 32, "query heads"), ("key-heads", 8, "key heads"), ("width", 128, "width of a head")
    for name, default, what in sizes:
        p.add_argument(f"--{name}", type=count, default=default, help=f"{what} (default: {default})")
    p.add_argument("--gain", type=float, default=1.5, help="how many times faster it must be to give up exactness (default: 1.5)")
    p.add_argument("--device", default="cpu", help="cpu, or the index of a GPU (default: cpu)")

    p = command("plan", _plan, "What a plan of layers (any system per layer) reaches and costs, before it runs; --run lets a real model read a real text under it.",
                "examples:\n  sparsetile plan                                    the surveys' hybrid of 32 layers\n"
                "  sparsetile plan plan.yaml --tokens 131072          a plan of your own: LayerPlan.to_yaml writes one\n"
                "  sparsetile plan --run                              hybrids of 6 layers on all-MiniLM-L6-v2 (needs the extra demo)")
    p.add_argument("plan", nargs="?", help="a YAML file (none: an example)")
    p.add_argument("--tokens", type=count, default=65536, help="length of a sequence (default: 65536)")
    p.add_argument("--run", dest="execute", action="store_true", help="run the plan, or some hybrids, on a small model")


def _part(name):
    return import_module(f"{_HERE}.{name}")


def _catalogue(args, device):
    entries, page = _part("entries"), _part("page")
    systems = [entries.find(name) for name in args.systems]
    if args.measure:
        return _measure(args, device(args.device), systems or entries.SYSTEMS)
    if args.pictures:
        for system in systems or entries.SYSTEMS:
            if system.small is not None:
                path = Path(args.pictures) / f"{system.name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                system.small.plot(page.SIDE, page.SIDE, path)
                print(json.dumps({"picture": str(path)}) if args.json else path)
        return 0
    if args.json:
        print("\n".join(json.dumps(page.record(system)) for system in systems or entries.SYSTEMS))
    elif args.markdown:
        print(page.markdown(), end="")
    else:
        print("\n\n".join(map(page.one, systems)) or page.text())
    return 0


def _measure(args, device, systems):
    speed, store = _part("speed"), _part("store")
    path = store.file_of(device, Path(args.into) if args.into else store.user_folder())
    data = store.begun(path, device, speed.shape_of(device), args.note)
    wanted = speed.lacking(device, args.tokens or ((1024, 4096) if device is None else (4096, 16384)), systems, () if args.again else data["rows"], args.passes)
    say = (lambda **event: print(json.dumps(event), flush=True)) if args.json else lambda **event: print(*event.values(), flush=True)
    if device is not None and wanted:
        begun = time.monotonic()
        for why in speed.compiled(device, wanted):
            say(not_called=f"not called: {why}")
        say(compiled=f"compiled in {time.monotonic() - begun:.0f} s")
    for row in speed.rows(device, wanted, args.seconds, args.commit):
        store.put(data, row)
        store.write(data, path)
        found = store.why_not(row) or f"{row['time_us'] / 1e3:10.2f} ms {row['times_dense']:8.2f} x dense"
        print(json.dumps(row) if args.json else f"{row['system']:28}{row['tokens']:9,} {row['pass']:10}{row['backend'] or '-':8}{found}", flush=True)
    say(path=str(path)) if args.json else print(f"written to {path}")
    return 0


def _recommend(args, device):
    part = _part("recommend")
    need = part.Need(args.length, args.memory, args.find, args.training, args.both_ways, args.layers, args.batch, args.heads, args.key_heads, args.width, args.gain)
    answer = part.recommend(need, device(args.device))
    print(json.dumps(answer) if args.json else part.text(answer))
    return 0 if answer["system"] else 1


def _plan(args):
    if args.execute:
        return import_module(f"{_HERE.rpartition('.')[0]}.ci.hybrid").main(args.plan, args.json)
    part = _part("plans")
    report = part.report(part.read(args.plan) if args.plan else part.example(), args.tokens)
    print(json.dumps(report) if args.json else part.text(report))
    return 0
