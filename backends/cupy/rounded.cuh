// A sum of probabilities whose largest counts as it was rounded for the product with the values: divided by it, a key that decides gives its value exactly, wherever the reference of the exponents stands
// (2^7.005 loses 1/270 to bfloat16), and what other keys have a say in changes within rounding. The lse is of the sum as it was.
#pragma once
#include "numbers.cuh"

template <int Kind> __device__ __forceinline__ float with_rounded(float sum, float largest) { return sum + (to_float<Kind>(from_float<Kind>(largest)) - largest); }
