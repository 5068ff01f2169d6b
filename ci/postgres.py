"""A PostgreSQL server of its own for tests: unprivileged, on loopback, in a temporary directory, gone afterwards.

    python -m sparsetile.ci.postgres sparsetile tune --storage {url} ...     runs the command with {url} filled in; without a command it prints the URL and waits
"""
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from glob import glob
from importlib.util import find_spec
from pathlib import Path


def binaries() -> str | None:
    """The directory of initdb and postgres, from PATH or where distributions put them."""
    found = shutil.which("initdb")
    folders = ([str(Path(found).resolve().parent)] if found else []) + sorted(glob("/usr/lib/postgresql/*/bin"), reverse=True)
    return next((folder for folder in folders if os.access(f"{folder}/postgres", os.X_OK) and os.access(f"{folder}/initdb", os.X_OK)), None)


def missing() -> str | None:
    """None, or the sentence that says why no server can run here."""
    if binaries() is None:
        return "PostgreSQL's server is not installed (apt-get install postgresql)"
    if find_spec("psycopg") is None:
        return "psycopg is not installed (pip install 'sparsetile[tune]')"
    return None


@contextlib.contextmanager
def server():
    """The URL of an empty database, as Optuna and SQLAlchemy take it."""
    folder = tempfile.mkdtemp(prefix="sparsetile-postgres-")
    who = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}  # the server refuses to run as root
    if who:
        os.chown(folder, 65534, 65534)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "HOME": folder}
    made = subprocess.run([f"{binaries()}/initdb", "-D", f"{folder}/data", "-U", "tuner", "-A", "trust", "-N", "-E", "UTF8"], cwd=folder, env=env, capture_output=True, text=True, **who)
    if made.returncode:
        raise RuntimeError(f"initdb: {made.stderr.strip()}")
    command = [f"{binaries()}/postgres", "-D", f"{folder}/data", "-h", "127.0.0.1", "-p", str(port), "-k", "", "-F"]
    with open(f"{folder}/log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, **who)
    try:
        _wait(port, process, folder)
        yield f"postgresql+psycopg://tuner@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(port, process, folder):
    import psycopg
    for _ in range(200):
        if process.poll() is not None:
            raise RuntimeError(f"postgres ended: {Path(folder, 'log').read_text().strip()[-500:]}")
        try:
            psycopg.connect(f"host=127.0.0.1 port={port} user=tuner dbname=postgres", connect_timeout=1).close()
            return
        except psycopg.OperationalError:
            time.sleep(0.05)
    raise RuntimeError("postgres did not answer within 10 s")


def main(argv) -> int:
    if missing():
        print(missing(), file=sys.stderr)
        return 1
    with server() as url:
        if argv:
            return subprocess.run([word.replace("{url}", url) for word in argv]).returncode
        print(url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(1e9)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
