// What the two forward kernels over selections share: their arguments.
#pragma once
#include "selections.cuh"

struct Params {
  const void *q, *k, *v;
  void* out;
  float* lse;
  const float* sink;
  Selected list;
  Positions at;
  i64 qb, qh, qt, qd, kb, kh, kt, kd, vb, vh, vt, vd;
  int Hq, group, D, Dv, slices, unused;
  float scale, softcap;
};
