"""Presets: the patterns of the papers, in the words of the papers. Conventions of other libraries: ops/convert.py."""
from sparsetile.ops.patterns import Causal, Dilated, Fixed, Full, Global, Pattern, PerHead, RandomBlocks, Sink, Strided, Window, flag, integer, shown
from sparsetile.ops.random_blocks import hash64


def dense(causal: bool = False) -> Pattern:
    """Every key, or with causal=True every earlier one and itself ("Attention Is All You Need", arXiv:1706.03762, section 3.2)."""
    return Causal() if flag("dense", "causal", causal) else Full()


def sparse_transformer_strided(stride: int) -> Pattern:
    """Strided attention of stride l, both of the paper's heads merged: {j : i - l <= j <= i} and {j : (i - j) mod l = 0, j <= i}.

    Sparse Transformer (arXiv:1904.10509, section 4.2, "strided"; section 4.3 for merging the heads). The window is written Window(l - 1), since the
    key at distance l is in the second set too.
    """
    stride = integer("sparse_transformer_strided", "stride", stride, 1)
    return Causal() & (Window(stride - 1) | Strided(stride))


def sparse_transformer_fixed(stride: int, summary: int) -> Pattern:
    """Fixed attention of stride l and expressivity c, both heads merged: the own block of l up to itself, and the last c positions of every earlier block.

    Sparse Transformer (arXiv:1904.10509, section 4.2, "fixed"). The paper uses l = 128 or 256 and c = 8, 16 or 32.
    """
    return Causal() & Fixed(stride, summary)


def longformer(window: int, *, dilation=1, globals=()) -> Pattern:
    """Sliding window of `window` keys in total, half on each side (and itself), with symmetric global tokens.

    window    the paper's w: each token attends to w / 2 tokens on each side; an even number
    dilation  gaps of d - 1 between the keys of the window, so it reaches w / 2 * d on each side; a sequence gives one dilation per head
    globals   positions that see all and are seen by all
    Longformer (arXiv:2004.05150, section 3.1). Add `& Causal()` for language modelling. Hugging Face's attention_window is this w, the first code's is one side
    (from_longformer_code).
    """
    window = integer("longformer", "window", window, 0)
    if window % 2:
        raise ValueError(f"longformer: window must be even, half on each side, got {window}; use {window - 1} or {window + 1}, or Window(left, right) for unequal sides")
    tokens = Global(globals)

    def head(step):
        step = integer("longformer", "dilation", step, 1)
        reach = window // 2 * step
        band = Window(reach, reach) if step == 1 else Dilated(reach, reach, step)
        return band | tokens if tokens.tokens else band
    if hasattr(dilation, "__len__") and not len(dilation):
        raise ValueError("longformer: dilation must be a number or one for each head, got none; use 1 for plain windows")
    return PerHead([head(step) for step in dilation]) if hasattr(dilation, "__iter__") else head(dilation)


def bigbird(block: int = 64, window: int = 3, globals: int = 2, random: int = 3, *, seed: int = 0, layer: int = 0, mode: str = "itc") -> Pattern:
    """Window, global and random attention in blocks, each layer with random blocks of its own.

    block    side of the blocks, the paper's b
    window   blocks of the sliding window in total, own block included: odd, (window - 1) / 2 on each side
    globals  mode "itc": the first `globals` blocks are made global; mode "etc": `globals` extra tokens that the caller puts in front of the sequence (positions
             0 .. globals - 1) are
    random   random key blocks for every query block, outside window and globals, so that none counts twice
    BigBird (arXiv:2007.14062, section 2 and appendix D). Hugging Face's version makes the first and the last block global instead.
    """
    window = integer("bigbird", "window", window, 0)
    if window % 2 == 0 and window:
        raise ValueError(f"bigbird: window must be odd, the own block and as many on each side, got {window}; use {window - 1} or {window + 1}")
    if mode not in ("itc", "etc"):
        raise ValueError(f'bigbird: mode must be "itc" (existing tokens become global) or "etc" (extra tokens in front), got {shown(mode)}; choose one of these')
    globals, block = integer("bigbird", "globals", globals), integer("bigbird", "block", block, 1)
    seed, layer = integer("bigbird", "seed", seed, 0, most=2 ** 63 - 1), integer("bigbird", "layer", layer)
    side = (window - 1) // 2
    fixed = Global(range(globals * block if mode == "itc" else globals))
    fixed = fixed | Window(side, side, block=block) if window else fixed
    own = int(hash64(seed, layer, 0)[0] >> 33)
    return fixed | RandomBlocks(random, block, seed=own, exclude=(fixed,)) if integer("bigbird", "random", random) else fixed


def mistral(window: int) -> Pattern:
    """Sliding window of `window` keys, the query itself counted: i - W < j <= i. Mistral 7B (arXiv:2310.06825, section 2)."""
    return Window(integer("mistral", "window", window, 1, "it counts the query itself") - 1)


def streaming_llm(sinks: int = 4, window: int = 1020) -> Pattern:
    """The first `sinks` keys and the `window` most recent ones, the query itself counted. StreamingLLM (arXiv:2309.17453, section 3.2; 4 + 1020 in its table 2).

    The paper numbers positions inside its cache; rotary embeddings are the caller's business.
    """
    sinks = integer("streaming_llm", "sinks", sinks)
    return Causal() & (Sink(sinks) | Window(integer("streaming_llm", "window", window, 1, "it counts the query itself") - 1))
