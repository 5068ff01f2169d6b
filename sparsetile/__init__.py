"""sparsetile: sparse attention, indexer scoring and latent KV decompression behind one op API.

Everything public is loaded on first use; importing this package imports no framework and no backend.
"""
from importlib import import_module as _import_module
from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout the rooms (ops, backends, ...) are top-level folders; an installed wheel has them inside this package.
_root = _Path(__file__).resolve().parent.parent
if (_root / "ops" / "__init__.py").is_file() and (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

_HOME = {
    "sparse_attention": "ops.attention", "merge_attention": "ops.merge",
    "indexer_scores": "ops.indexer", "indexer_topk": "ops.indexer", "topk": "ops.indexer", "importance_topk": "ops.importance",
    "latent_decompress": "ops.latent", "latent_attention": "ops.latent",
    "quantise_float8": "ops.quantise", "dequantise_float8": "ops.quantise", "hadamard": "ops.quantise",
    "Selection": "ops.selection", "Layout": "ops.layout", "LayerPlan": "ops.plan", "Selector": "ops.plan", "Call": "ops.plan",
    "Pattern": "ops.patterns", "Full": "ops.patterns", "Causal": "ops.patterns", "Window": "ops.patterns", "Dilated": "ops.patterns",
    "Strided": "ops.patterns", "Compressed": "ops.patterns", "Fixed": "ops.patterns", "Global": "ops.patterns", "Sink": "ops.patterns", "RandomBlocks": "ops.patterns",
    "Blocks": "ops.patterns", "Documents": "ops.patterns", "PerHead": "ops.patterns",
    "sparse_transformer_strided": "ops.presets", "sparse_transformer_fixed": "ops.presets", "longformer": "ops.presets",
    **dict.fromkeys(("from_flash_attention", "from_jax", "from_torch_sdpa", "from_huggingface", "from_huggingface_longformer", "from_longformer_code", "from_sparse_transformer"), "ops.convert"),
    "bigbird": "ops.presets", "mistral": "ops.presets", "streaming_llm": "ops.presets", "dense": "ops.presets",
    "linear_attention": "relatives.linear", "performer_attention": "relatives.performer", "linformer_attention": "relatives.linformer",
    "gated_delta_net": "relatives.delta", "kimi_delta_attention": "relatives.delta",
    "moba": "systems.moba", "moba_selection": "systems.moba", "exact_topk": "systems.exact_topk", "exact_topk_selection": "systems.exact_topk",
    "routing": "systems.routing", "reformer": "systems.reformer", "reformer_selection": "systems.reformer", "lsh_buckets": "systems.reformer",
    "infllm_v2": "systems.infllm", "infllm_v2_selection": "systems.infllm",
    "vertical_slash": "systems.minference", "vertical_slash_selection": "systems.minference", "pooled_blocks": "systems.minference", "pooled_blocks_layout": "systems.minference",
    "dsa_attention": "systems.dsa", "dsa_latent_attention": "systems.dsa", "dsa_selection": "systems.dsa", "dsa_two_level_selection": "systems.dsa_two_level",
    "dsa_warmup": "systems.dsa_training", "dsa_training": "systems.dsa_training",
    "PagedKV": "ops.caches.kv", "PagedLatent": "ops.caches.latent", "IndexerKeys": "ops.caches.indexer", "RollingKV": "ops.caches.rolling",
    "CacheFull": "ops.caches.pages", "bytes_per_token": "ops.caches.accounting", "compare_memory": "ops.caches.accounting",
    "explain": "ops.dispatch", "Explanation": "ops.dispatch",
    "native_sparse_attention": "systems.nsa", "CompressionMLP": "systems.compression", "NativeSparseCache": "systems.nsa_cache",
    "Unsupported": "backends.contract", "tune": "autotune.tune",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name):
    if name in _HOME:
        if _HOME[name].startswith(("ops.", "systems.")):
            _install_tuner()
        value = getattr(_import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__


def _install_tuner():
    """SPARSETILE_TUNE=on lets a call tune at a miss: the tuner is installed with the first use of an op, never otherwise."""
    import os
    if os.environ.get("SPARSETILE_TUNE") == "on":
        _import_module(f"{__name__}.autotune.hook").install()
