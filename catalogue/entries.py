"""The table: every system, one entry each. A new one is added here (a call of its own in calls.py); the page, the measurements and the advice read it."""
import sparsetile as st
from sparsetile.catalogue import calls
from sparsetile.catalogue.calls import attend, first_pairs, score_operations, seen
from sparsetile.catalogue.system import System
from sparsetile.relatives import delta

BLOCK, BLOCK_BACKWARD = ("block_attention",), ("attention_delta", "block_attention_backward")
CHOICE, GATHER_BACKWARD = ("indexer_topk", "gather_attention"), ("attention_delta", "gather_attention_backward")
WITH_MODEL = "the model is trained with it"


def dense(name, title, paper, **more):
    return System(name, "dense", title, paper, "st.sparse_attention(q, k, v, st.Causal())", complexity="T S", reach="1", real=st.Causal(), small=st.Causal(),
                  kernels=BLOCK, backward=BLOCK_BACKWARD, **more)


def fixed(name, title, paper, preset, real, small, **more):
    """A pattern of the literature: block attention over lists of blocks."""
    return System(name, "fixed pattern", title, paper, f"st.sparse_attention(q, k, v, st.{preset})", run=attend, real=real, small=small,
                  **{"kernels": BLOCK, "backward": BLOCK_BACKWARD, "trained": WITH_MODEL} | more)


def chosen(name, title, paper, call, attention, **more):
    """Keys chosen by content from the attention's own queries and keys: attention(x, v)."""
    return System(name, "chosen by content", title, paper, call, **{
        "run": lambda x, rule: attention(x, x.v), "chosen": lambda x: seen(x, lambda v: attention(x, v)), "finds": "chosen", "trained": WITH_MODEL,
        "reach": "1 where the choice falls on it, not known before", "kernels": CHOICE, "backward": GATHER_BACKWARD} | more)


def relative(name, title, paper, call, run, **more):
    """A linear relative: computed by the caller's framework, differentiated by its autograd."""
    return System(name, "linear relative", title, paper, call, run=run,
                  **{"finds": "gist", "reach": "1, through the summary", "token": lambda s: 0, "trained": WITH_MODEL} | more)


def recurrent(name, title, paper, call, run):
    """A linear relative that flash-linear-attention computes."""
    return relative(name, title, paper, call, run, complexity="T D Dv", sees="all earlier keys, through one D x Dv state that forgets and overwrites",
                    works=lambda device: delta.unavailable() or (None if device is not None else "flash-linear-attention computes on a GPU"),
                    state=lambda s: 4 * s.Hq * s.D * s.D, counted=lambda s, N: 6 * N * s.Hq * s.D * s.D)


SYSTEMS = (
    dense("dense", "Multi-head attention", "1706.03762, section 3.2", sees="every earlier key", trained="nothing: it is what others approximate",
          run=lambda x, rule: st.sparse_attention(x.q, x.k_all, x.v_all, rule), token=lambda s: 2 * s.Hq * s.D * s.itemsize),
    dense("gqa", "Grouped-query attention", "2305.13245, section 2.2", sees="every earlier key; a group of query heads shares it", trained="the model has as many key heads", run=attend),

    fixed("sparse-transformer-strided", "Sparse Transformer, strided", "1904.10509, section 4.2", "sparse_transformer_strided(128)",
          st.sparse_transformer_strided(128), st.sparse_transformer_strided(6), finds="landmarks", complexity="T (l + S / l)",
          sees="the last l keys, and every l-th one before", reach="2", kernels=("block_attention", "merge_attention")),
    fixed("sparse-transformer-fixed", "Sparse Transformer, fixed", "1904.10509, section 4.2", "sparse_transformer_fixed(128, 8)",
          st.sparse_transformer_fixed(128, 8), st.sparse_transformer_fixed(8, 2), finds="landmarks", complexity="T (l + c S / l)",
          sees="its own block of l keys, and the last c of every earlier block", reach="2", kernels=("block_attention", "merge_attention")),
    fixed("longformer", "Longformer", "2004.05150, section 3.1", "longformer(512, globals=range(64))",
          st.longformer(512, globals=range(64)), st.longformer(6, globals=range(2)), causal=False, finds="landmarks", complexity="T (w + 2 g)",
          sees="w / 2 keys on each side, and g global tokens, which see all", reach="2, through a global token"),
    fixed("bigbird", "BigBird", "2007.14062, section 2", "bigbird(128)",
          st.bigbird(128), st.bigbird(4, window=3, globals=1, random=1), causal=False, finds="landmarks", complexity="T (w + g + r) b",
          sees="w blocks around its own, g global blocks, r random ones", reach="2, through a global block"),
    fixed("mistral", "Sliding window (Mistral 7B)", "2310.06825, section 2", "mistral(4096)", st.mistral(4096), st.mistral(6), finds="nearby", complexity="T W",
          sees="the last W keys, itself counted", reach="(T - 1) / (W - 1)", kept=lambda N: min(N, 4096)),
    fixed("streaming-llm", "StreamingLLM", "2309.17453, section 3.2", "streaming_llm(4, 1020)", st.streaming_llm(4, 1020), st.streaming_llm(1, 5), finds="nearby",
          complexity="T (n + W)", sees="the first n keys, and the last W", reach="(T - 1) / (W - 1)", kept=lambda N: min(N, 1024),
          trained="nothing: it runs on a model trained dense"),

    System("mla", "latent", "Multi-head latent attention", "2405.04434, section 2.1", "st.latent_attention(q_nope, q_rope, latent, k_rope, w_uk, w_uv, st.Causal())",
           complexity="T S", sees="every earlier key, rebuilt from a latent of R values that all heads share", reach="1", trained=WITH_MODEL,
           run=lambda x, rule: calls.latent(x, rule, "decompressed"), real=st.Causal(), small=st.Causal(),
           kernels=("latent_decompress", "block_attention"), backward=(*BLOCK_BACKWARD, "grouped_matmul"), token=lambda s: (s.R + s.P) * s.itemsize,
           counted=lambda s, N: 4 * N * s.Hq * s.R * s.D + N * (N + 1) * s.Hq * (2 * s.D + s.P)),

    chosen("dsa", "DeepSeek sparse attention: lightning indexer and selection over the latent", "2512.02556, section 2.1",
           "st.dsa_latent_attention(q_nope, q_rope, latent, k_rope, w_uk, w_uv, index_q=index_q, index_k=index_k, index_weights=index_w, top_k=2048)", None,
           run=lambda x, rule: calls.dsa_latent(x), chosen=lambda x: seen(x, lambda v: calls.dsa(x, v)),
           complexity="T k, and T S / 2 of the indexer's products", sees="the k keys that the indexer scores highest (st.dsa_two_level_selection, approximated: those inside the blocks whose mean key it likes best)",
           trained="the indexer is trained on the model's dense attention (st.dsa_warmup), then both (st.dsa_training)",
           kernels=("indexer_topk", "grouped_matmul", "gather_attention"), backward=(*GATHER_BACKWARD, "grouped_matmul"), token=lambda s: (s.R + s.P) * s.itemsize + s.Di + 4,
           counted=lambda s, N: N * (N + 1) * s.Hi * s.Di + 2 * first_pairs(s.top_k, N) * s.Hq * (2 * s.R + s.P) + 4 * N * s.Hq * s.R * s.D),
    chosen("exact-topk", "Top-k of the exact scores", "2106.06899, section 3", "st.exact_topk(q, k, v, top_k=2048)", calls.exact, complexity="T S of scores, T k",
           sees="the k keys with its largest products: the bound of every selector", trained="nothing: it is what selectors aim at",
           counted=lambda s, N: calls.exact_topk_operations(s, N, top_k=s.top_k)),
    chosen("moba", "MoBA", "2502.13189, section 2.2", "st.moba(q, k, v, block=512, top_k=4)", calls.moba, complexity="T S / b, T k",
           sees="its own block of b keys, and the earlier blocks whose mean it likes best",
           counted=lambda s, N: calls.moba_operations(s, N, block=s.top_k // 4, top_k=4)),
    chosen("infllm-v2", "InfLLM-V2", "2509.24663, section 3", "st.infllm_v2(q, k, v, top_k=32, force_last=10)", calls.infllm, complexity="T S / 16, T k",
           sees="the first block of b keys, the nearest ones, and the blocks whose compressed keys its group likes best", trained="the model is trained dense, then briefly with it; its weights serve both",
           kernels=("topk", "gather_attention"), counted=lambda s, N: calls.infllm_operations(s, N, stride=16, select_block=64, top_k=s.top_k // 64)),
    chosen("vertical-slash", "MInference, vertical and slash lines", "2407.02490, section 3", "st.vertical_slash(q, k, v, vertical=512, slash=1536)", calls.vertical_slash,
           complexity="64 S of scores, T k", sees="keys and distances of its head that the last 64 queries like best, the first and the nearest among them",
           trained="nothing: it estimates in prefill what a model trained dense looks at", kernels=("topk", "gather_attention"),
           counted=lambda s, N: calls.vertical_slash_operations(s, N, vertical=s.top_k // 4, slash=s.top_k - s.top_k // 4, last_q=64)),
    chosen("pooled-blocks", "MInference, block estimates", "2407.02490, section 3", "st.pooled_blocks(q, k, v, block=64, top_k=32)", calls.pooled_blocks,
           chosen=calls.blocks_of_picture, complexity="T S / b^2, T k", sees="the blocks of b keys whose mean its block of queries likes best (in the picture a mark is a block)",
           trained="nothing: it estimates in prefill what a model trained dense looks at", kernels=("indexer_topk", "block_attention"), backward=BLOCK_BACKWARD,
           counted=lambda s, N: calls.pooled_blocks_operations(s, N, block=64, top_k=s.top_k // 64)),
    chosen("routing", "Routing Transformer", "2003.05997, section 4.1", "st.routing(q, k, v, centroids=centroids, cluster_size=2048)", calls.routing, complexity="T C, T w",
           sees="the earlier of the w keys in its cluster", reach="1 within a cluster, not known before",
           counted=lambda s, N: -(-N // s.top_k) * (4 * N * s.Hq * s.D + score_operations(s, first_pairs(s.top_k, s.top_k)))),
    chosen("reformer", "Reformer (LSH, queries are their own keys)", "2001.04451, section 2", "st.reformer(q, None, v, chunk=64)", None,
           run=lambda x, rule: calls.reformer(x, x.v_all), chosen=lambda x: seen(x, lambda v: calls.reformer(x, v), "Hq"), complexity="T log T of sorting, 2 T c",
           sees="the keys of its chunk of c and of the one before, sorted by hash bucket", token=lambda s: 2 * s.Hq * s.D * s.itemsize,
           counted=lambda s, N: 2 * N * (N // 64) * s.Hq * s.D + score_operations(s, N * min(N, 128))),
    chosen("nsa", "Native Sparse Attention", "2502.11089, section 3", "st.native_sparse_attention(q, k, v, gates)", None,
           run=lambda x, rule: calls.native(x, x.v, x.gates), chosen=lambda x: seen(x, lambda v: calls.native(x, v, (None, x.gates[..., 1], x.gates[..., 2]))),
           complexity="T (S / 16 + n b + w)", reach="1, through compressed keys",
           sees="every earlier key compressed; of these the n best blocks of b keys, and a window (the picture leaves the compressed keys out)",
           kernels=("block_attention", "importance_topk", "gather_attention", "merge_attention"), backward=(*BLOCK_BACKWARD, "gather_attention_backward"),
           token=lambda s: 2 * s.Hk * s.D * s.itemsize * 17 // 16,
           counted=lambda s, N: N * N // 32 * 6 * s.Hq * s.D + score_operations(s, first_pairs(1024, N) + first_pairs(512, N))),

    relative("linear", "Linear attention", "2006.16236, section 3", "st.linear_attention(q, k, v, causal=True)", lambda x, rule: st.linear_attention(x.q, x.k, x.v, causal=True),
             complexity="T D Dv", sees="all earlier keys, through one D x Dv state",
             state=lambda s: 4 * s.Hk * s.D * (s.D + 1), counted=lambda s, N: 2 * N * s.D * s.D * (s.Hq + s.Hk)),
    relative("performer", "Performer (FAVOR+)", "2009.14794, section 2", "st.performer_attention(q, k, v, features=256, causal=True)",
             lambda x, rule: st.performer_attention(x.q, x.k, x.v, features=x.shape.M, causal=True), complexity="T M (D + Dv)",
             sees="all earlier keys, through one M x Dv state: the softmax estimated by M random features",
             state=lambda s: 4 * s.Hk * s.M * (s.D + 1), counted=lambda s, N: 4 * N * s.M * s.D * (s.Hq + s.Hk)),
    relative("linformer", "Linformer", "2006.04768, section 4", "st.linformer_attention(q, k, v, E)", lambda x, rule: st.linformer_attention(x.q, x.k, x.v, x.mix), causal=False,
             complexity="(T + S) R D", sees="R learned mixtures of all keys, later ones too", trained="the model is trained with it, for one length",
             state=lambda s: 2 * s.Hk * s.M * s.D * s.itemsize, counted=lambda s, N: 4 * N * s.M * s.D * (s.Hq + s.Hk)),
    recurrent("gated-deltanet", "Gated DeltaNet", "2412.06464, section 3", "st.gated_delta_net(q, k, v, decay, beta)",
              lambda x, rule: st.gated_delta_net(x.q, x.k_all, x.v_all, x.decay, x.beta)),
    recurrent("kimi-delta", "Kimi Delta Attention", "2510.26692, section 3", "st.kimi_delta_attention(q, k, v, decay, beta)",
              lambda x, rule: st.kimi_delta_attention(x.q, x.k_all, x.v_all, x.decays, x.beta)),

    System("jamba", "out of scope", "State-space hybrids (Mamba in Jamba)", "2403.19887",
           refusal="a state-space layer is no attention: it has no queries and keys, and no pattern or selection to give it; take its own package, "
                   "and plan the attention layers between with LayerPlan"),
)


def find(name: str) -> System:
    found = {system.name: system for system in SYSTEMS}
    if name not in found:
        raise ValueError(f"system: expected one of {', '.join(found)}, got {name!r}; see sparsetile catalogue")
    return found[name]
