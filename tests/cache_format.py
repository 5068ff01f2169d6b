"""The fp8 formats of caches written down a second time, in exact arithmetic: an independent answer for `append`, byte by byte.

    token of a latent cache    R bytes float8_e4m3fn | R / 128 float32 scales | P bfloat16 rotary values           (512 | 16 | 128: 656 bytes)
    page of an indexer cache   D bytes float8_e4m3fn of key 0, of key 1, ... | float32 scale of key 0, of key 1, ...
"""
import struct
from bisect import bisect
from fractions import Fraction

import numpy as np

TINY = Fraction(2) ** -126


def _e4m3(code):
    """The value of a byte without sign, by the format's definition: 4 exponent bits of bias 7, 3 mantissa bits, 0x7f is NaN."""
    exponent, mantissa = code >> 3, code & 7
    return Fraction(mantissa, 8) * Fraction(2) ** -6 if exponent == 0 else (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


VALUES = [_e4m3(code) for code in range(0x7F)]


def float32(x: Fraction) -> Fraction:
    """Rounded to the nearest float32, ties to even (normal range and below)."""
    if x == 0:
        return x
    exponent = abs(x).numerator.bit_length() - x.denominator.bit_length()
    exponent = max(-126, exponent - (abs(x) < Fraction(2) ** exponent))
    unit = Fraction(2) ** (exponent - 23)
    return round(x / unit) * unit  # Python rounds halves to even


def float8(x: float, scale: Fraction) -> int:
    """x / scale, divided in float32, as the nearest byte, ties to the even one."""
    q = float32(Fraction(x) / scale)
    at = bisect(VALUES, abs(q))
    code = min(range(at - 1, min(at + 1, 0x7F)), key=lambda c: (abs(VALUES[c] - abs(q)), c & 1))
    return code | (0x80 if np.signbit(x) else 0)


def quantised(group, power_of_two):
    """(bytes, float32 scale as 4 bytes) of one group of floats."""
    if not np.isfinite(group).all():
        return bytes([0x7F] * len(group)), struct.pack("<f", float("nan"))
    scale = max(float32(max(Fraction(abs(float(x))) for x in group) / 448), TINY)
    if power_of_two:
        power = Fraction(2) ** -126
        while power < scale:
            power *= 2
        scale = power
    return bytes(float8(float(x), scale) for x in group), struct.pack("<f", float(scale))


def bfloat16(x) -> bytes:
    """Nearest even, from the bits of the float32."""
    bits = struct.unpack("<I", struct.pack("<f", float(x)))[0]
    return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF)


def latent_token(latent, rotary, power_of_two) -> bytes:
    groups = [quantised(latent[n:n + 128], power_of_two) for n in range(0, len(latent), 128)]
    return b"".join(values for values, _ in groups) + b"".join(scale for _, scale in groups) + b"".join(map(bfloat16, rotary))


def indexer_page(keys, power_of_two) -> bytes:
    found = [quantised(key, power_of_two) for key in keys]
    return b"".join(values for values, _ in found) + b"".join(scale for _, scale in found)


def golden_inputs():
    """latent [4,512], rotary [4,64], keys [4,128] float32: exact in bfloat16, of many sizes, with zeros and a group that is all zero."""
    i = np.arange(4 * 512).reshape(4, 512)
    latent = ((i * 37 % 101) - 50) / 16 * 2.0 ** (i // 128 % 9 - 4) * (1 + i % 3)
    latent[3, 128:256] = 0
    j = np.arange(4 * 64).reshape(4, 64)
    rotary = ((j * 29 % 97) - 48) / 8 * 2.0 ** (j % 5 - 2)
    return latent.astype(np.float32), rotary.astype(np.float32), latent[:, 100:228].astype(np.float32)


def golden_lines():
    """name -> hex of the golden file."""
    latent, rotary, keys = golden_inputs()
    lines = {}
    for power_of_two in (False, True):
        word = "power_of_two" if power_of_two else "arbitrary"
        for n in range(4):
            lines[f"latent {word} {n}"] = latent_token(latent[n], rotary[n], power_of_two).hex()
        lines[f"indexer {word} page"] = indexer_page(keys, power_of_two).hex()
    return lines


if __name__ == "__main__":
    print("# float8 caches, byte for byte; made by `python tests/cache_format.py`, which also says how the inputs are made.\n#")
    print("\n".join("# " + line.strip() for line in __doc__.strip().splitlines()[2:]))
    print("# arbitrary: scale = max |x| / 448 in float32; power_of_two: the next power of two that is not smaller. value = float8(x / scale), nearest even.")
    for name, text in golden_lines().items():
        print(f"{name}: {text}")
