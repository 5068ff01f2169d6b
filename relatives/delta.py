"""gated_delta_net and kimi_delta_attention: recurrent relatives with a state that forgets, computed by the package flash-linear-attention where it is installed."""
from importlib import import_module
from importlib.util import find_spec

from sparsetile.backends.contract import Unsupported
from sparsetile.ops import checks
from sparsetile.relatives import arguments


def unavailable() -> str | None:
    """None, or why flash-linear-attention cannot be used: it is imported by the first call only."""
    missing = [name for name in ("torch", "triton", "fla") if find_spec(name) is None]
    return None if not missing else f"this system is computed by flash-linear-attention, and {' and '.join(missing)} is not installed: pip install 'flash-linear-attention[cuda]'"


def gated_delta_net(q, k, v, decay, beta, *, scale=None, normalize: bool = True):
    """S_t = exp(decay_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  out_t = scale S_t^T q_t: one decay for each head and token. It is no approximation of the
    softmax: it replaces it.

    q, k [B,H,T,D], v [B,H,T,Dv] float16 or bfloat16, PyTorch on a GPU; decay [B,H,T] <= 0 (float32 or as q), beta [B,H,T] in 0..1; causal by nature.
    scale      None is D^-0.5; normalize: queries and keys are brought to length 1 first, as the paper does
    Returns [B,H,T,Dv]. Differentiable (on Hopper the package refuses it with Triton 3.4 to 3.7.0). Unsupported with the reason where the package is missing or does not take the arrays. Source: arXiv 2412.06464, equation 10.
    """
    return _run("gated_delta_rule", "chunk_gated_delta_rule", q, k, v, decay, beta, 3, scale, normalize)


def kimi_delta_attention(q, k, v, decay, beta, *, scale=None, normalize: bool = True):
    """S_t = (I - beta_t k_t k_t^T) Diag(exp(decay_t)) S_{t-1} + beta_t k_t v_t^T,  out_t = scale S_t^T q_t: a decay for each channel, decay [B,H,T,D].

    The rest as gated_delta_net, D at most 256. Source: Kimi Linear, arXiv 2510.26692, equation 1."""
    return _run("kda", "chunk_kda", q, k, v, decay, beta, 4, scale, normalize)


def _run(folder, name, q, k, v, decay, beta, axes, scale, normalize):
    B, H, Hk, T, S, D, Dv = arguments.attention(q, k, v, decay=decay, beta=beta)
    checks.same("k", "shape of q", list(q.shape), list(k.shape), "the recurrence has a key for every query and head")
    for what, x, shape in (("decay", decay, (B, H, T, D)[:axes]), ("beta", beta, (B, H, T))):
        checks.array(what, x, len(shape), "[B,H,T,D]" if len(shape) == 4 else "[B,H,T]", arguments.FLOATS)
        checks.same(what, "shape", list(shape), list(x.shape), "one for every head and token" + ", and channel" * (len(shape) == 4))
    scale, normalize = D ** -0.5 if scale is None else checks.number("scale", scale), checks.flag("normalize", normalize)
    sentence = refusal(q, axes)
    if sentence:
        raise Unsupported(sentence)
    kernel = getattr(import_module(f"fla.ops.{folder}"), name)
    out, _ = kernel(*(x.transpose(1, 2) for x in (q, k, v)), g=decay.transpose(1, 2), beta=beta.transpose(1, 2), scale=scale, use_qk_l2norm_in_kernel=normalize)  # [B,T,H,Dv]
    return out.transpose(1, 2)


def refusal(q, axes: int) -> str | None:
    """None, or why these arrays are not taken."""
    caller, device = checks.together({"q": q})
    kind = str(q.dtype).removeprefix("torch.")
    if unavailable():
        return unavailable()
    if caller != "torch" or device is None:
        return f"flash-linear-attention computes on PyTorch tensors on a GPU, and q is a {caller} array on {'the CPU' if device is None else 'a GPU'}; move it there"
    if kind not in ("float16", "bfloat16"):
        return f"flash-linear-attention takes float16 and bfloat16, not {kind}; cast q, k and v"
    if axes == 4 and q.shape[-1] > 256:
        return f"flash-linear-attention's KDA takes D up to 256, not {q.shape[-1]}; split wider heads"
    return None
