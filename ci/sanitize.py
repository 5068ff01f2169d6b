"""Every CuPy kernel on small, odd shapes with garbage indices, lengths and positions: a program to run under compute-sanitizer memcheck (ci/gpu.sh sanitize)."""
import sys

import torch

import sparsetile as st


def main(backend="cupy") -> int:
    generator = torch.Generator("cuda").manual_seed(0)
    ran = []

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator, device="cuda", dtype=torch.int64).to(torch.int32)

    def done(name):
        torch.cuda.synchronize()
        ran.append(name)
    garbage = torch.tensor([2 ** 31 - 1, -2 ** 31, -123456, 10 ** 9], dtype=torch.int32, device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        for D, Dv in ((31, 33), (64, 64), (100, 72)):
            q, k, v = (normal(2, 6, 37, D, dtype=dtype).requires_grad_(), normal(2, 2, 53, D, dtype=dtype).requires_grad_(), normal(2, 2, 53, Dv, dtype=dtype).requires_grad_())
            for name, rule in (("window", st.Window(9, 2) | st.Sink(3)), ("blocks", st.RandomBlocks(1, 16, seed=1)), ("fine", st.Causal() & (st.Window(7) | st.Strided(8)))):
                st.sparse_attention(q, k, v, rule, backend=backend).float().sum().backward()
                done(f"block attention {name} {D} {dtype}")
            for length, start in ((garbage[:2], None), (garbage[2:], garbage[:2]), (None, garbage[:2])):
                st.sparse_attention(q, k, v, st.Causal(), kv_length=length, q_start=start, backend=backend)
                done("garbage lengths")
            for G in (1, 2, 6):
                indices = integers(-5, 80, 2, G, 37, 11)
                indices[..., 3] = garbage[0]
                indices[..., 5] = garbage[1]
                for granularity in (1, 16):
                    chosen = st.Selection(indices, granularity, integers(-3, 20, 2, G, 37), causal=granularity > 1)
                    st.sparse_attention(q, k, v, chosen, backend=backend).float().sum().backward()
                    done(f"gather G {G} granularity {granularity}")
        iq, ik, w = normal(2, 5, 37, 72, dtype=dtype), normal(2, 53, 72, dtype=dtype), normal(2, 5, 37, dtype=torch.float32)
        window = dict(key_start=integers(-100, 100, 2, 37), key_end=integers(-100, 100, 2, 37), q_start=garbage[:2])
        st.indexer_scores(iq, ik, w, **window, backend=backend), done("scores")
        for options in ({}, dict(pool=16, force_first=1, force_last=2)):
            st.indexer_topk(iq, ik, w, 7, **window, **options, backend=backend), done("indexer top-k")
        latent, uk, uv, rope = normal(2, 53, 100, dtype=dtype), normal(3, 100, 24, dtype=dtype), normal(3, 100, 40, dtype=dtype), normal(2, 53, 8, dtype=dtype)
        st.latent_decompress(latent, uk, uv, k_rope=rope, backend=backend), done("decompress")
        for mode in ("absorbed", "decompressed"):
            st.latent_attention(normal(2, 3, 37, 24, dtype=dtype), normal(2, 3, 37, 8, dtype=dtype), latent, rope, uk, uv, st.Causal(), mode=mode, backend=backend), done("latent")
    for S, top_k in ((1, 1), (7, 3), (1001, 64), (5000, 2048), (3, 700)):
        st.topk(normal(2, 3, S, dtype=torch.float32), top_k, key_start=integers(-9, S + 9, 2, 3), key_end=integers(-9, S + 9, 2, 3), backend=backend), done("top-k")
    q8 = normal(1, 64, 37, 128).to(torch.float8_e4m3fn)
    st.indexer_topk(q8, normal(1, 4100, 128).to(torch.float8_e4m3fn), normal(1, 64, 37, dtype=torch.float32), 512, k_scale=normal(1, 4100, dtype=torch.float32).abs(), backend=backend), done("fp8")
    # large enough for an architecture's own paths, forward and backward
    for D, Dv in ((64, 64), (128, 128), (192, 128)):
        q, k, v = (normal(1, heads, T, width).requires_grad_() for heads, T, width in ((4, 300, D), (2, 333, D), (2, 333, Dv)))
        for name, rule in (("causal", st.Causal()), ("window", st.Window(70) | st.Sink(3)), ("random", st.RandomBlocks(1, 128, seed=1))):
            st.sparse_attention(q, k, v, rule, backend=backend).float().sum().backward(), done(f"large {name} {D}")
            for length, start in ((garbage[:1], None), (garbage[2:3], garbage[:1])):
                st.sparse_attention(q.detach(), k.detach(), v.detach(), rule, kv_length=length, q_start=start, backend=backend), done("large, garbage lengths")
    for heads, T in ((128, 9), (64, 5), (16, 5), (8, 3)):
        q, latent = normal(1, heads, T, 576).requires_grad_(), normal(1, 1, 400, 576).requires_grad_()
        indices = integers(-50, 450, 1, 1, T, 200)
        indices[..., 7] = garbage[0]
        st.sparse_attention(q, latent, None, st.Selection(indices, lengths=integers(-3, 250, 1, 1, T)), value_width=512, backend=backend).float().sum().backward(), done(f"latent gather {heads}")
    for T in (1, 2, 16):  # decoding
        for heads, rule in ((8, st.Window(99) | st.Sink(4)), (16, None)):
            q, k, v = normal(4, heads, T, 128), normal(4, 2, 777, 128), normal(4, 2, 777, 128)
            st.sparse_attention(q, k, v, rule, kv_length=garbage, backend=backend), done(f"decode {T}")
        st.sparse_attention(normal(4, 32, T, 576), normal(4, 1, 500, 576), None, value_width=512, kv_length=garbage, backend=backend), done(f"latent decode {T}")
    st.latent_decompress(normal(1, 300, 512), normal(4, 512, 128), normal(4, 512, 128), k_rope=normal(1, 300, 64), backend=backend), done("large decompress")
    outs, lses = [normal(2, 3, 37, 40) for _ in range(3)], [normal(2, 3, 37, dtype=torch.float32) for _ in range(3)]
    st.merge_attention(outs, lses, backend=backend), done("merge")
    print(f"{len(ran)} calls of {backend} ran")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
