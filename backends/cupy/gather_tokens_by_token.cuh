// Scores and probabilities of 64 tokens with tokens as the rows of the product (gather_tokens_hopper.cu, 8 and 16 heads): S^T [64 tokens, HEADS] = K Q^T, the query in shared memory.
#pragma once

// Of the heads of a lane (head_of): the largest product this lane has seen, the reference m of the sums (powers of two), the sum of its tokens.
struct Heads { float top[COLUMNS], m[COLUMNS], sum[COLUMNS]; bool wide; };

// The largest of all lanes and warps that hold a head; the group's votes keep two exchanges apart.
__device__ __forceinline__ void exchange_tops(unsigned char* raw, Heads& h, int warp, int lane) {
  float* tops = (float*)(raw + TOPS);
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) h.top[i] = fmaxf(h.top[i], __shfl_xor_sync(~0u, h.top[i], lanes));
    if (lane < 4) tops[warp * HEADS + head_of(lane, i)] = h.top[i];
  }
  named_sync(1, 128);
#pragma unroll
  for (int i = 0; i < COLUMNS; i++)
#pragma unroll
    for (int w = 0; w < 4; w++) h.top[i] = fmaxf(h.top[i], tops[w * HEADS + head_of(lane, i)]);
}

// Products of 64 tokens become probabilities relative to 2^m (latent_hopper.cuh has the reasons). Whether a reference moved: then `factor` is for what was summed before.
__device__ __forceinline__ bool probabilities(unsigned char* raw, float (&s)[HEADS / 2], Heads& h, float (&factor)[COLUMNS], float scale2, int warp, int lane) {
  bool above = false;
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) {
    factor[i] = 1.f;
    h.top[i] = fmaxf(h.top[i], fmaxf(s[i / 2 * 4 + i % 2], s[i / 2 * 4 + 2 + i % 2]));
    above |= fmaf(h.top[i], scale2, -LAZY) > h.m[i];
  }
  const bool moved = named_or(1, 128, above);  // and from here on all four warps' products are done with the tile
  if (moved) {
    exchange_tops(raw, h, warp, lane);
    bool wide = false;
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
      const float m = __fmul_rn(h.top[i], scale2);
      if (m > h.m[i]) {
        factor[i] = ex2(h.m[i] - m);
        h.m[i] = m;
        h.sum[i] *= factor[i];
      }
      wide |= fabsf(h.m[i]) > WIDE && h.top[i] != -inf();
    }
    h.wide = __any_sync(~0u, wide);
  }
  float unit = scale2;
  if (h.wide) {
    unit = 1.f;
#pragma unroll
    for (int i = 0; i < HEADS / 2; i++) s[i] = __fmul_rn(s[i], scale2);
  }
#pragma unroll
  for (int i = 0; i < HEADS / 2; i++) {
    s[i] = ex2(fmaf(s[i], unit, -h.m[i / 4 * 2 + i % 2]));
    h.sum[i / 4 * 2 + i % 2] += s[i];
  }
  return moved;
}

// At the end of an item, a thread for each head: sums relative to 2^m become sums relative to the head's largest score, in natural units and rounded once as the backward does.
__device__ __forceinline__ void finish(const Params& p, unsigned char* raw, const Item& x, float* inverse, Heads& h, int warp, int lane) {
  float2* ends = (float2*)(raw + ENDS);  // not TOPS: a warp behind may still read there
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      h.sum[i] += __shfl_xor_sync(~0u, h.sum[i], lanes);
      h.top[i] = fmaxf(h.top[i], __shfl_xor_sync(~0u, h.top[i], lanes));
    }
    if (lane < 4) {
      const int head = head_of(lane, i);
      ends[warp * HEADS + head] = make_float2(h.top[i], h.sum[i]);
      if (warp == 0) inverse[head] = h.m[i];
    }
  }
  named_sync(1, 128);
  const int head = warp * 32 + lane;
  if (head < HEADS) {
    const float m = inverse[head];
    float top = -inf(), sum = 0.f;
#pragma unroll
    for (int w = 0; w < 4; w++) { top = fmaxf(top, ends[w * HEADS + head].x); sum += ends[w * HEADS + head].y; }
    const bool empty = top == -inf() && sum == 0.f;
    const float largest = __fmul_rn(top, p.scale), unit = ex2(h.wide ? m - __fmul_rn(top, p.scale2) : -fmaf(top, p.scale2, -m)), total = sum * unit;
    const float sink = p.sink && head < x.rows ? ex2((__ldg(p.sink + x.head + head) - largest) * LOG2E) : 0.f;
    inverse[head] = empty ? 0.f : unit / (total + sink);
    if (p.lse && head < x.rows) p.lse[((i64)x.b * p.Hq + x.head + head) * p.at.T + x.t] = empty ? -inf() : largest + logf(total);
  }
}

// Probabilities of a warp's 16 tokens, a row for each head: K-major for the second product.
__device__ __forceinline__ void store_probabilities(u32 weights, const float (&s)[HEADS / 2], int warp, int lane) {
  const u32 row = lane & 7, part = HEADS == 8 ? 0 : lane >> 4, to = weights + part * 1024 + row * 128 + ((warp * 2 + (lane >> 3 & 1) ^ row) << 4);
#pragma unroll
  for (int j = 0; j < HEADS / 8; j += 2) {
    const float *x = &s[4 * j], *y = HEADS == 8 ? x : x + 4;  // 8 heads: the same twice
    stmatrix_transposed_at(to + j * 1024, pack<KIND>(x[0], x[1]), pack<KIND>(x[2], x[3]), pack<KIND>(y[0], y[1]), pack<KIND>(y[2], y[3]));
  }
}

__device__ __forceinline__ void scores(const Params& p, unsigned char* raw, u32 base, u32 bars) {
  const int tid = threadIdx.x % 128, warp = tid / 32, lane = tid & 31;
  const u64 query = descriptor_of(base + QUERY, 16, 1024, SWIZZLE_128);
  u32 slot = 0, phase = 0, made = 0, turn = 1, patience = PATIENCE;
  for (int left = 0; left >= 0;) {
#pragma unroll 1
    for (int part = 0; part < QUERY_SLOTS; part++) {
      bar_wait(LANDED(slot), phase, patience);
#pragma unroll
      for (int i = tid; i < SLOT / 16; i += 128)
        if (part * (SLOT / 16) + i < 9 * CHUNK / 16) ((uint4*)(raw + QUERY + part * SLOT))[i] = ((const uint4*)(raw + slot * SLOT))[i];
      __syncwarp();
      if (lane < 2) bar_arrive(FREE(slot));  // for the other group, too
      advance<SLOTS>(slot, phase);
    }
    shared_to_copy_engine();
    named_sync(1, 128);
    Heads h = {};
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) { h.top[i] = -inf(); h.m[i] = LOWEST; }
    bool first = true;
    do {
      const u32 begin = uniform(slot);
      float s[HEADS / 2];
      hold(s);
#pragma unroll
      for (int c = 0; c < 9; c++) {
        if (c % 3 == 0) {
          bar_wait(LANDED(slot), phase, patience);
          advance<SLOTS>(slot, phase);
          wgmma_fence();
        }
        const u64 keys = descriptor_of(base + part_after(begin, c), 16, 1024, SWIZZLE_128);
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma<KIND, K_MAJOR>(s, keys + 2 * k, query + c * (CHUNK >> 4) + 2 * k, c || k);
      }
      wgmma_commit();
      const Found* found = (const Found*)(raw + FOUND) + begin;
      const u32 word = found->words[warp / 2] >> (16 * (warp & 1) + lane / 4);
      const int item = found->item;
      left = uniform(found->left);
      bar_wait(DONE(made), turn, patience);
      wgmma_wait<0>(); hold(s);
      __syncwarp();
      if (lane < 3) bar_arrive(FREE(slot_after(begin, lane)));  // for this group; the other gives back what it has added
#pragma unroll
      for (int i = 0; i < HEADS / 2; i++)
        if (!(word >> (i & 2) * 4 & 1)) s[i] = -inf();
      float factor[COLUMNS];
      const bool moved = probabilities(raw, s, h, factor, p.scale2, warp, lane);
      if (moved && warp == 0 && lane < 4)
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) ((float*)(raw + FACTORS))[made * HEADS + head_of(lane, i)] = factor[i];
      store_probabilities(base + WEIGHTS + made * CHUNK, s, warp, lane);
      if (tid == 0) ((Made*)(raw + MADE))[made] = {{moved && !first}, left, item};
      if (left <= 0) finish(p, raw, Item(p, item), (float*)(raw + INVERSE) + made * HEADS, h, warp, lane);
      __syncwarp();
      if (lane == 0) bar_arrive(READY(made));
      advance<2>(made, turn);
      first = false;
    } while (left > 0);
  }
}
