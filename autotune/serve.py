"""Servers beside a run: the dashboard of a storage, and Optuna's gRPC proxy in front of a database, for more workers than it has connections."""
from importlib.util import find_spec

from sparsetile.autotune import search


def _storage(storage, module: str, packages: str):
    if find_spec(module) is None:
        raise ImportError(f"{module} is not installed: pip install {packages}")
    return search.storage_of(storage)


def dashboard(storage, host: str = "localhost", port: int = 8080) -> None:
    """The course of every search in the storage, in a browser, until it is interrupted."""
    held = _storage(storage, "optuna_dashboard", "optuna-dashboard")
    import optuna_dashboard
    optuna_dashboard.run_server(held, host=host, port=port)


def proxy(storage, host: str = "localhost", port: int = 13000) -> None:
    """Serve a database to workers that tune with --storage grpc://host:port, until it is interrupted. The port is open to whoever reaches it: Optuna's proxy knows no passwords."""
    if not str(storage).startswith(("postgresql", "mysql", "sqlite")):
        raise ValueError(f"storage: expected the URL of a database for the proxy, got {str(storage)!r}; a journal file needs none, its hosts share the file")
    held = _storage(storage, "grpc", "grpcio protobuf")
    search.engine().storages.run_grpc_proxy_server(held, host=host, port=port)
