"""PyTorch: the ops as registered operators, one file each; all are there once one is."""
from sparsetile.ops.torch_attention import attention
from sparsetile.ops.torch_indexer import importance_topk, indexer_scores, indexer_topk, topk
from sparsetile.ops.torch_latent import grouped_matmul, latent_decompress, latent_mode
from sparsetile.ops.torch_library import no_tangents, wanted
from sparsetile.ops.torch_merge import merge, weighted_sum

__all__ = ["attention", "grouped_matmul", "importance_topk", "indexer_scores", "indexer_topk", "latent_decompress", "latent_mode", "merge", "no_tangents", "topk", "wanted", "weighted_sum"]
