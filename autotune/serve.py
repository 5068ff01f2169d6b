"""Servers beside a run: the dashboard of a storage, and Optuna's gRPC proxy in front of a database, for more workers than it has connections."""
from importlib.util import find_spec

from sparsetile.autotune import search


def _storage(storage, *packages):
    missing = [name for name, module in packages if find_spec(module) is None]
    if missing:
        raise ImportError(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: pip install {' '.join(missing)}")
    return search.storage_of(storage)


def dashboard(storage, host: str = "localhost", port: int = 8080) -> None:
    """The course of every search in the storage, in a browser, until it is interrupted."""
    held = _storage(storage, ("optuna-dashboard", "optuna_dashboard"))
    import optuna_dashboard
    optuna_dashboard.run_server(held, host=host, port=port)


def proxy(storage, host: str = "localhost", port: int = 13000) -> None:
    """Serve a database to workers that tune with --storage grpc://host:port, until it is interrupted. The port is open to whoever reaches it: Optuna's proxy knows no passwords."""
    if not str(storage).startswith(("postgresql", "mysql", "sqlite")):
        raise ValueError(f"storage: expected the URL of a database for the proxy, got {str(storage)!r}; a journal file needs none, its hosts share the file")
    held = _storage(storage, ("grpcio", "grpc"), ("protobuf", "google.protobuf"))
    search.engine().storages.run_grpc_proxy_server(held, host=host, port=port)
