"""The servers beside a run: what is missing is said with its install command, and the gRPC proxy shares a work list as its database does."""
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from sparsetile.autotune import batch, cli, fleet, progress, search, serve
from sparsetile.ci import postgres

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("command, storage, package", [("dashboard", "x.journal", "optuna-dashboard"), ("proxy", "sqlite:///x.db", "grpcio protobuf")])
def test_what_is_missing_is_said(command, storage, package, monkeypatch, capsys):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert cli.main([command, storage]) == 1 and f"not installed: pip install {package}\n" in capsys.readouterr().err


def test_a_journal_needs_no_proxy_and_an_address_has_a_port(monkeypatch):
    with pytest.raises(ValueError, match="expected the URL of a database for the proxy, got 'x.journal'"):
        serve.proxy("x.journal")
    with pytest.raises(ValueError, match="got 'grpc://somewhere' .*expected grpc://host:port"):
        search.storage_of("grpc://somewhere")


EVENTS = [{"event": "start", "workload": "w", "backend": "cupy", "feasible": 9, "total": 12, "resumed": 2},
          {"event": "trial", "workload": "w", "backend": "cupy", "config": {"k": 1}, "time_us": None, "failure": "hang: no answer within 5 s", "done": 3, "best_us": None},
          {"event": "trial", "workload": "w", "backend": "cupy", "config": {"k": 2}, "time_us": 1500.0, "failure": None, "done": 4, "best_us": 1500.0},
          {"event": "final", "workload": "w", "backend": "cupy", "entry": {"config": {"k": 2}, "time_us": 1500.0, "default_us": 3000.0, "ties": 2, "band": 0.031, "search": {"evaluated": 4, "failed": 1}}},
          {"event": "done", "workload": "w", "entry": {}, "path": "p/topk.yaml"}, {"event": "failed", "workload": "v", "error": "nothing ran"}]


@pytest.mark.parametrize("terminal, term, words", [(True, "xterm", ["2/3 workloads", "about", "s left", "failures: hang 1", "1.500 ms", "3.000 ms", "2.00 x", "2 within 3.1% (noisy)", "nothing ran"]),
                                                   (True, "dumb", ["[1/3] w on cupy: 9 legal configs of 12, 2 known", "1.500 ms (default 3.000 ms)", "tied 2 within 3.1% (noisy)", "{'hang': 1}", "nothing ran"]),
                                                   (False, "xterm", ["[1/3] w on cupy", "written to p/topk.yaml"])])
def test_what_a_run_shows(terminal, term, words, monkeypatch, capsys):
    monkeypatch.setenv("TERM", term), monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: terminal, raising=False)
    with progress.show(3, False) as say:
        for event in EVENTS:
            say(event)
    shown = "".join(capsys.readouterr())
    assert not [word for word in words if word not in shown] and ("workloads," in shown) == (words[0] == "2/3 workloads"), shown


@pytest.mark.parametrize("storage, why", [("nowhere/journal", "FileNotFoundError"), ("garbage", "UnicodeDecodeError"), ("foo://bar", "NoSuchModuleError"),
                                          ("postgresql+psycopg://me:secret@127.0.0.1:1/db", "OperationalError"), ("sqlite:////nowhere/x.db", "OperationalError")])
def test_a_storage_that_does_not_answer_is_said_in_a_line(storage, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("garbage").write_bytes(bytes(range(128, 256)) + b"\n\n")
    if "psycopg" in storage:
        pytest.importorskip("psycopg", reason="psycopg is not installed")
    assert cli.main(["tune", "cpu/topk-32", "--storage", storage]) == 1
    said = capsys.readouterr().err
    assert said.startswith("sparsetile tune: storage: expected a journal file") and f"({why}: " in said and "secret" not in said and said.count("\n") == 1


def test_a_database_that_is_lost_ends_the_run_in_a_line(monkeypatch, capsys):
    def lost(*_, **__):
        raise search.engine().exceptions.StorageInternalError("the commit\nfailed") from OSError("connection refused\nby the server")
    monkeypatch.setattr(batch, "run", lost)
    assert cli.main(["tune", "cpu/topk-32", "--storage", "postgresql://me:secret@host/db"]) == 1
    assert capsys.readouterr().err == ("sparsetile tune: storage: expected an answer of 'postgresql://me:***@host/db', got none (OSError: connection refused); run it again when it answers: "
                                       "what it was told is kept\n")


def test_a_journal_with_half_a_line_goes_on(tmp_path):
    path = tmp_path / "journal"
    with fleet.WorkList(path).claim("a") as claim:
        claim.finish()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code":4,"worker_id":"killed')  # a full disk, a machine that lost its power
    with fleet.WorkList(path).claim("b") as claim:
        claim.finish()
    assert path.read_bytes().startswith(whole) and b"killed" not in path.read_bytes()
    assert fleet.WorkList(path).done("a") and fleet.WorkList(path).done("b")


def test_the_proxy_shares_a_work_list(tmp_path):
    """In front of PostgreSQL where a server can run here, else of SQLite: the proxy and its protocol are the same."""
    pytest.importorskip("grpc", reason="grpcio is not installed")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with nullcontext(f"sqlite:///{tmp_path}/list.db") if postgres.missing() else postgres.server() as url:
        proxy = subprocess.Popen([sys.executable, "-m", "sparsetile", "proxy", url, "--port", str(port)], cwd=ROOT)
        try:
            for _ in range(100):
                time.sleep(0.1)
                with socket.socket() as probe:
                    if probe.connect_ex(("localhost", port)) == 0:
                        break
            one, two, direct = fleet.WorkList(f"grpc://localhost:{port}"), fleet.WorkList(f"grpc://localhost:{port}"), fleet.WorkList(url)
            with one.claim("a") as claim:
                assert two.claim("a") is None and direct.claim("a") is None
                claim.finish()
            assert two.done("a") and direct.done("a") and two.claim("a") is None and two.claim("b")
        finally:
            proxy.kill()
            proxy.wait()
