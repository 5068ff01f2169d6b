"""The table: every system, one entry each. A new one is added here and nowhere else; the page, the measurements and the advice read it."""
import numpy as np

import sparsetile as st
from sparsetile.catalogue.system import System
from sparsetile.relatives import delta

BLOCK = ("block_attention",)
BLOCK_BACKWARD = ("attention_delta", "block_attention_backward")
GATHER_BACKWARD = ("attention_delta", "gather_attention_backward")
WITH_MODEL = "the model is trained with it"


def attend(x, rule):
    """A pattern or a selection over grouped heads."""
    return st.sparse_attention(x.q, x.k, x.v, rule)


def latent(x, rule, mode):
    return st.latent_attention(x.q_nope, x.q_rope, x.latent, x.k_rope, x.w_uk, x.w_uv, rule, mode=mode)


def indexed(x):
    """The lightning indexer's choice."""
    return st.indexer_topk(x.index_q, x.index_k, x.index_w, x.shape.top_k)


def seen(x, call) -> np.ndarray:
    """[T,S] booleans of the first head: with one-hot values, call(v) shows which keys went into each output."""
    v = np.broadcast_to(np.eye(x.tokens, dtype=np.float32), (1, x.shape.Hk, x.tokens, x.tokens))
    return call(v)[0, 0] > 0


def moba(x, v):
    """Four blocks of a quarter of top_k; of small shapes, three of two keys."""
    block = max(2, x.shape.top_k // 4)
    return st.moba(x.q, x.k, v, block=block, top_k=x.shape.top_k // block)


def routing(x, v):
    return st.routing(x.q, x.k, v, centroids=x.centroids, cluster_size=x.shape.top_k)


def fixed(name, title, paper, call, real, small, **more):
    """A pattern of the literature: block attention over lists of blocks."""
    return System(name, "fixed pattern", title, paper, call, run=attend, real=real, small=small, **{"kernels": BLOCK, "backward": BLOCK_BACKWARD, "trained": WITH_MODEL} | more)


def relative(name, title, paper, call, run, **more):
    """A linear relative: computed by the caller's framework, differentiated by its autograd."""
    return System(name, "linear relative", title, paper, call, run=run, **{"finds": "gist", "reach": "1, through the summary", "token": lambda shape: 0, "trained": WITH_MODEL} | more)


def chosen(name, title, paper, call, attention, **more):
    """Keys chosen by content from the attention's own queries and keys: attention(x, v)."""
    return System(name, "chosen by content", title, paper, call, run=lambda x, rule: attention(x, x.v), chosen=lambda x: seen(x, lambda v: attention(x, v)), **{
        "finds": "chosen", "reach": "1 where the choice falls on it, not known before", "kernels": ("indexer_topk", "gather_attention"), "backward": GATHER_BACKWARD, "trained": WITH_MODEL} | more)


def recurrent(name, title, paper, call, run):
    return relative(name, title, paper, call, run, complexity="T D Dv", sees="all earlier keys, through one D x Dv state that forgets and overwrites", works=lambda device: delta.unavailable() or (None if device is not None else "flash-linear-attention computes on a GPU"),
                    state=lambda s: 4 * s.Hq * s.D * s.D, counted=lambda s, N: 6 * N * s.Hq * s.D * s.D)


SYSTEMS = (
    System("dense", "dense", "Multi-head attention", "1706.03762, section 3.2", "st.sparse_attention(q, k, v, st.Causal())", complexity="T S", sees="every earlier key", reach="1",
           trained="nothing: it is what others approximate", run=lambda x, rule: st.sparse_attention(x.q, x.k_all, x.v_all, rule), real=st.Causal(), small=st.Causal(),
           kernels=BLOCK, backward=BLOCK_BACKWARD, token=lambda s: 2 * s.Hq * s.D * s.itemsize),
    System("gqa", "dense", "Grouped-query attention", "2305.13245, section 2.2", "st.sparse_attention(q, k, v, st.Causal())", complexity="T S", sees="every earlier key; a group of query heads shares it",
           reach="1", trained="the model has as many key heads", run=attend, real=st.Causal(), small=st.Causal(), kernels=BLOCK, backward=BLOCK_BACKWARD),
    fixed("sparse-transformer-strided", "Sparse Transformer, strided", "1904.10509, section 4.2", "st.sparse_attention(q, k, v, st.sparse_transformer_strided(128))",
          st.sparse_transformer_strided(128), st.sparse_transformer_strided(6), complexity="T (l + S / l)", sees="the last l keys, and every l-th one before", reach="2", finds="landmarks",
          kernels=("block_attention", "merge_attention")),
    fixed("sparse-transformer-fixed", "Sparse Transformer, fixed", "1904.10509, section 4.2", "st.sparse_attention(q, k, v, st.sparse_transformer_fixed(128, 8))",
          st.sparse_transformer_fixed(128, 8), st.sparse_transformer_fixed(8, 2), complexity="T (l + c S / l)", sees="its own block of l keys, and the last c of every earlier block", reach="2",
          finds="landmarks", kernels=("block_attention", "merge_attention")),
    fixed("longformer", "Longformer", "2004.05150, section 3.1", "st.sparse_attention(q, k, v, st.longformer(512, globals=range(64)))", st.longformer(512, globals=range(64)),
          st.longformer(6, globals=range(2)), complexity="T (w + 2 g)", sees="w / 2 keys on each side, and g global tokens, which see all", reach="2, through a global token", finds="landmarks", causal=False),
    fixed("bigbird", "BigBird", "2007.14062, section 2", "st.sparse_attention(q, k, v, st.bigbird(128))", st.bigbird(128), st.bigbird(4, window=3, globals=1, random=1),
          complexity="T (w + g + r) b", sees="w blocks around its own, g global blocks, r random ones", reach="2, through a global block", finds="landmarks", causal=False),
    fixed("mistral", "Sliding window (Mistral 7B)", "2310.06825, section 2", "st.sparse_attention(q, k, v, st.mistral(4096))", st.mistral(4096), st.mistral(6), complexity="T W",
          sees="the last W keys, itself counted", reach="(T - 1) / (W - 1)", finds="nearby", kept=lambda N: min(N, 4096)),
    fixed("streaming-llm", "StreamingLLM", "2309.17453, section 3.2", "st.sparse_attention(q, k, v, st.streaming_llm(4, 1020))", st.streaming_llm(4, 1020), st.streaming_llm(1, 5),
          complexity="T (n + W)", sees="the first n keys, and the last W", reach="(T - 1) / (W - 1)", finds="nearby", kept=lambda N: min(N, 1024), trained="nothing: it runs on a model trained dense"),
    System("mla", "latent", "Multi-head latent attention", "2405.04434, section 2.1", "st.latent_attention(q_nope, q_rope, latent, k_rope, w_uk, w_uv, st.Causal())", complexity="T S",
           sees="every earlier key, rebuilt from a latent of R values that all heads share", reach="1", trained=WITH_MODEL, run=lambda x, rule: latent(x, rule, "decompressed"), real=st.Causal(), small=st.Causal(),
           kernels=("latent_decompress", "block_attention"), backward=(*BLOCK_BACKWARD, "grouped_matmul"), token=lambda s: (s.R + s.P) * s.itemsize,
           counted=lambda s, N: 4 * N * s.Hq * s.R * s.D + N * (N + 1) * s.Hq * (2 * s.D + s.P)),
    System("dsa", "chosen by content", "DeepSeek sparse attention: lightning indexer and selection over the latent", "2512.02556, section 2.1",
           "st.latent_attention(q_nope, q_rope, latent, k_rope, w_uk, w_uv, st.indexer_topk(index_q, index_k, index_w, 2048))", complexity="T k, and T S / 2 of the indexer's products",
           sees="the k keys that the indexer scores highest", reach="1 where the indexer chooses it, not known before", finds="chosen", trained="the indexer is trained on the model's dense attention, then both",
           run=lambda x, rule: latent(x, indexed(x), "absorbed"), chosen=lambda x: seen(x, lambda v: st.sparse_attention(x.q, x.k, v, indexed(x))),
           kernels=("indexer_topk", "grouped_matmul", "gather_attention"), backward=(*GATHER_BACKWARD, "grouped_matmul"), token=lambda s: (s.R + s.P) * s.itemsize + s.Di + 4,
           counted=lambda s, N: N * (N + 1) * s.Hi * s.Di + 2 * _pairs(s, N) * s.Hq * (2 * s.R + s.P) + 4 * N * s.Hq * s.R * s.D),
    chosen("exact-topk", "Top-k of the exact scores", "2106.06899, section 3", "st.exact_topk(q, k, v, top_k=2048)", lambda x, v: st.exact_topk(x.q, x.k, v, top_k=x.shape.top_k),
           complexity="T S of scores, T k", sees="the k keys with its largest products: the bound of every selector", trained="nothing: it is what selectors aim at",
           counted=lambda s, N: N * (N + 1) * s.Hq * s.D + 4 * _pairs(s, N) * s.Hq * s.D),
    chosen("moba", "MoBA", "2502.13189, section 2.2", "st.moba(q, k, v, block=512, top_k=4)", moba, complexity="T S / b, T k", sees="its own block of b keys, and the earlier blocks whose mean it likes best",
           counted=lambda s, N: N * N * s.Hq * s.D // (s.top_k // 4) + 4 * _pairs(s, N) * s.Hq * s.D),
    chosen("routing", "Routing Transformer", "2003.05997, section 4.1", "st.routing(q, k, v, centroids=centroids, cluster_size=2048)", routing, complexity="T C, T w",
           sees="the earlier of the w keys in its cluster", reach="1 within a cluster, not known before",
           counted=lambda s, N: 2 * -(-N // s.top_k) * s.Hq * (2 * N * s.D + s.top_k * (s.top_k + 1) * s.D)),
    relative("linear", "Linear attention", "2006.16236, section 3", "st.linear_attention(q, k, v, causal=True)", lambda x, rule: st.linear_attention(x.q, x.k, x.v, causal=True), complexity="T D Dv",
             sees="all earlier keys, through one D x Dv state", state=lambda s: 4 * s.Hk * s.D * (s.D + 1), counted=lambda s, N: 2 * N * s.D * s.D * (s.Hq + s.Hk)),
    relative("performer", "Performer (FAVOR+)", "2009.14794, section 2", "st.performer_attention(q, k, v, features=256, causal=True)",
             lambda x, rule: st.performer_attention(x.q, x.k, x.v, features=x.shape.M, causal=True), complexity="T M (D + Dv)",
             sees="all earlier keys, through one M x Dv state: the softmax estimated by M random features", state=lambda s: 4 * s.Hk * s.M * (s.D + 1), counted=lambda s, N: 4 * N * s.M * s.D * (s.Hq + s.Hk)),
    relative("linformer", "Linformer", "2006.04768, section 4", "st.linformer_attention(q, k, v, E)", lambda x, rule: st.linformer_attention(x.q, x.k, x.v, x.mix), complexity="(T + S) R D",
             sees="R learned mixtures of all keys, later ones too", causal=False, trained="the model is trained with it, for one length", state=lambda s: 2 * s.Hk * s.M * s.D * s.itemsize,
             counted=lambda s, N: 4 * N * s.M * s.D * (s.Hq + s.Hk)),
    recurrent("gated-deltanet", "Gated DeltaNet", "2412.06464, section 3", "st.gated_delta_net(q, k, v, decay, beta)", lambda x, rule: st.gated_delta_net(x.q, x.k_all, x.v_all, x.decay, x.beta)),
    recurrent("kimi-delta", "Kimi Delta Attention", "2510.26692, section 3", "st.kimi_delta_attention(q, k, v, decay, beta)",
              lambda x, rule: st.kimi_delta_attention(x.q, x.k_all, x.v_all, x.decays, x.beta)),
    System("jamba", "out of scope", "State-space hybrids (Mamba in Jamba)", "2403.19887", refusal="a state-space layer is no attention: it has no queries and keys, and no pattern or selection to give it; "
           "take its own package, and plan the attention layers between with LayerPlan"),
)


def _pairs(shape, N):
    """Pairs of a causal choice of top_k keys."""
    k = min(shape.top_k, N)
    return k * (k + 1) // 2 + (N - k) * k


def find(name: str) -> System:
    found = {system.name: system for system in SYSTEMS}
    if name not in found:
        raise ValueError(f"system: expected one of {', '.join(found)}, got {name!r}; see sparsetile catalogue")
    return found[name]
