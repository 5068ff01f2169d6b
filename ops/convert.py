"""Windows of other libraries, by the library's name. "window" means five things; a converter says which, so nobody has to guess.

Our Window(left, right) is inclusive on both sides and leaves out the query in the counts; queries stand bottom-right (q_start = S - T) unless
q_start= says otherwise. Where a library aligns top-left when T != S, pass q_start=0 to the op; the docstrings say so.
"""
from sparsetile.ops.patterns import Causal, Dilated, Full, Pattern, Window, integer, shown
from sparsetile.ops.presets import longformer


def _side(owner, name, value):
    return None if integer(owner, name, value, -1, "-1 is unbounded") == -1 else value


def from_flash_attention(left: int = -1, right: int = -1, causal: bool = False) -> Pattern:
    """flash_attn's window_size=(left, right): inclusive on both sides, -1 unbounded; causal=True means right 0. Bottom-right like ours."""
    left, right = (_side("from_flash_attention", name, value) for name, value in (("left", left), ("right", right)))
    return Window(left, 0 if causal else right)


def from_jax(local_window_size=None, is_causal: bool = False) -> Pattern:
    """jax.nn.dot_product_attention's local_window_size: one number for both sides or (left, right), inclusive. JAX aligns top-left: pass q_start=0."""
    if local_window_size is None:
        return Causal() if is_causal else Full()
    sides = local_window_size if isinstance(local_window_size, (tuple, list)) else (local_window_size, local_window_size)
    if len(sides) != 2:
        raise ValueError(f"from_jax: local_window_size must be one number or (left, right), got {shown(local_window_size)}; pass a pair of distances")
    sides = [integer("from_jax", "local_window_size", side) for side in sides]
    return Window(*sides) & Causal() if is_causal else Window(*sides)


def from_torch_sdpa(is_causal: bool = False) -> Pattern:
    """torch's scaled_dot_product_attention is_causal. It aligns top-left when T != S: pass q_start=0."""
    return Causal() if is_causal else Full()


def from_huggingface(sliding_window: int | None) -> Pattern:
    """sliding_window of Hugging Face decoders (Mistral, Gemma, Qwen, gpt-oss): W keys, the query itself counted; None is causal without a window."""
    return Causal() if sliding_window is None else Window(integer("from_huggingface", "sliding_window", sliding_window, 1, "it counts the query itself") - 1)


def from_huggingface_longformer(attention_window: int, globals=()) -> Pattern:
    """attention_window of Hugging Face's Longformer: total width, half on each side, even."""
    if integer("from_huggingface_longformer", "attention_window", attention_window) % 2:
        raise ValueError(f"from_huggingface_longformer: attention_window must be even, half on each side, got {attention_window}; Hugging Face takes no odd one either")
    return longformer(attention_window, globals=globals)


def from_longformer_code(attention_window: int, dilation: int = 1) -> Pattern:
    """attention_window of allenai/longformer: keys on one side, as many on the other; dilation stretches both."""
    side = integer("from_longformer_code", "attention_window", attention_window) * integer("from_longformer_code", "dilation", dilation, 1)
    return Window(side, side) if dilation == 1 else Dilated(side, side, dilation)


def from_sparse_transformer(local: int) -> Pattern:
    """The paper's local head {max(0, i - l), ..., i}: l + 1 keys, the query itself counted (arXiv:1904.10509, section 4.2)."""
    return Window(integer("from_sparse_transformer", "local", local))
