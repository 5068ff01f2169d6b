// Scores and probabilities of 64 tokens with tokens as the rows of the product (gather_tokens_hopper.cu, 8 and 16 heads): S^T [64 tokens, HEADS] = K Q^T, the query in shared memory.
// Two groups take turns by steps of an item. A warp stands still while its products are waiting for the tensor cores, so that nobody but another group keeps them busy beside a
// softmax. Reference and flags pass from step to step: the probabilities of a step are those that one group would make.
#pragma once

// Of the heads of a lane (head_of): the largest product this lane has seen, the reference m of the sums (powers of two), the sum of its tokens.
struct Heads {
  float top[COLUMNS], m[COLUMNS], sum[COLUMNS];
  bool wide;
  __device__ __forceinline__ void widen() {
    bool any = false;
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) any |= fabsf(m[i]) > WIDE && m[i] != LOWEST;
    wide = __any_sync(~0u, any);
  }
};

// The reference that the step before, another group's, has left
__device__ __forceinline__ void follow(const unsigned char* raw, Heads& h, int lane) {
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) {
    const float m = ((const float*)(raw + REFERENCES))[head_of(lane, i)];
    h.sum[i] *= ex2(h.m[i] - m);
    h.m[i] = m;
  }
  h.widen();
}

// The largest of all lanes and warps that hold a head; the group's votes keep two exchanges apart.
__device__ __forceinline__ void exchange_tops(unsigned char* raw, Heads& h, int who, int warp, int lane) {
  float* tops = (float*)(raw + TOPS) + who * 4 * HEADS;
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) h.top[i] = fmaxf(h.top[i], __shfl_xor_sync(~0u, h.top[i], lanes));
    if (lane < 4) tops[warp * HEADS + head_of(lane, i)] = h.top[i];
  }
  named_sync(OWN + who, 128);
#pragma unroll
  for (int i = 0; i < COLUMNS; i++)
#pragma unroll
    for (int w = 0; w < 4; w++) h.top[i] = fmaxf(h.top[i], tops[w * HEADS + head_of(lane, i)]);
}

// Products of 64 tokens become probabilities relative to 2^m (latent_hopper.cuh has the reasons), m the reference that the step before has left. Whether it moved: then what was summed
// before takes a factor.
template <class Before> __device__ __forceinline__ bool probabilities(unsigned char* raw, float (&s)[HEADS / 2], Heads& h, float* factors, float scale2, int who, int warp, int lane,
                                                                      const Before& before) {
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) h.top[i] = fmaxf(h.top[i], fmaxf(s[i / 2 * 4 + i % 2], s[i / 2 * 4 + 2 + i % 2]));
  before();
  bool above = false;
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) above |= fmaf(h.top[i], scale2, -LAZY) > h.m[i];
  const bool moved = named_or(OWN + who, 128, above);  // and from here on all four warps' products are done with the tile
  if (RARE(moved)) {
    exchange_tops(raw, h, who, warp, lane);
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
      const float m = __fmul_rn(h.top[i], scale2);
      float factor = 1.f;
      if (m > h.m[i]) {
        factor = ex2(h.m[i] - m);
        h.m[i] = m;
        h.sum[i] *= factor;
      }
      if (warp == 0 && lane < 4) {
        factors[head_of(lane, i)] = factor;
        ((float*)(raw + REFERENCES))[head_of(lane, i)] = h.m[i];
      }
    }
    h.widen();
  }
  if (RARE(h.wide)) {
#pragma unroll
    for (int i = 0; i < HEADS / 2; i++) s[i] = ex2(__fmul_rn(s[i], scale2) - h.m[i / 4 * 2 + i % 2]);
  } else {
#pragma unroll
    for (int i = 0; i < HEADS / 2; i++) s[i] = ex2(fmaf(s[i], scale2, -h.m[i / 4 * 2 + i % 2]));
  }
#pragma unroll
  for (int i = 0; i < HEADS / 2; i++) h.sum[i / 4 * 2 + i % 2] += s[i];
  return moved;
}

// What a group has of an item after its last step, for the group that finishes it
__device__ __forceinline__ void leave_ends(unsigned char* raw, Heads& h, int who, int warp, int lane) {
  float2* ends = (float2*)(raw + ENDS) + (who * 4 + warp) * HEADS;  // not TOPS: a warp behind may still read there
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {
      h.sum[i] += __shfl_xor_sync(~0u, h.sum[i], lanes);
      h.top[i] = fmaxf(h.top[i], __shfl_xor_sync(~0u, h.top[i], lanes));
    }
    if (lane < 4) ends[head_of(lane, i)] = make_float2(h.top[i], h.sum[i]);
  }
}

// At the end of an item, a thread for each head: sums relative to 2^m become sums relative to the head's largest score, in natural units and rounded once as the backward does.
// Of the other group, if it had a step: its sums take the factor of the last step.
__device__ __forceinline__ void finish(const Params& p, unsigned char* raw, const Item& x, float* inverse, const float* factors, Heads& h, bool both, int who, int warp, int lane) {
  leave_ends(raw, h, who, warp, lane);
#pragma unroll
  for (int i = 0; i < COLUMNS; i++)
    if (warp == 0 && lane < 4) inverse[head_of(lane, i)] = h.m[i];
  named_sync(OWN + who, 128);
  const int head = warp * 32 + lane;
  if (head < HEADS) {
    const float m = inverse[head];
    const float2 *own = (const float2*)(raw + ENDS) + who * 4 * HEADS + head, *other = (const float2*)(raw + ENDS) + (who ^ 1) * 4 * HEADS + head;
    float top = -inf(), sum = 0.f;
    if (both) {
#pragma unroll
      for (int w = 0; w < 4; w++) { top = fmaxf(top, other[w * HEADS].x); sum += other[w * HEADS].y; }
      if (factors) sum *= factors[head];
    }
#pragma unroll
    for (int w = 0; w < 4; w++) { top = fmaxf(top, own[w * HEADS].x); sum += own[w * HEADS].y; }
    const bool empty = top == -inf() && sum == 0.f;
    const float ahead = h.wide ? __fmul_rn(top, p.scale2) - m : fmaf(top, p.scale2, -m), largest = __fmul_rn(top, p.scale), unit = ex2(-ahead), total = sum * unit;
    const float sink = p.sink && head < x.rows ? ex2((__ldg(p.sink + x.head + head) - largest) * LOG2E) : 0.f;
    inverse[head] = empty ? 0.f : total / ((total + sink) * with_rounded<KIND>(sum, ex2(ahead)));
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

// The first group also brings the query of an item from the ring to its place, once the other's products no longer need the last one's.
__device__ __forceinline__ void scores(const Params& p, unsigned char* raw, u32 base, u32 bars, int who) {
  const int tid = threadIdx.x % 128, warp = tid / 32, lane = tid & 31;
  const u64 query = descriptor_of(base + QUERY, 16, 1024, SWIZZLE_128);
  u32 slot = 0, phase = 0, made = 0, turn = 1, patience = PATIENCE;
  bool any = false;  // step before this one
  for (bool more = true; more;) {
    if (who == 0) {
      if (any) named_sync(QUERY_FREE, 256);
      const u32 begin = slot;
#pragma unroll 1
      for (int part = 0; part < QUERY_SLOTS; part++) {
        bar_wait(LANDED(slot), phase, patience);
#pragma unroll
        for (int i = tid; i < SLOT / 16; i += 128)
          if (part * (SLOT / 16) + i < 9 * CHUNK / 16) ((uint4*)(raw + QUERY + part * SLOT))[i] = ((const uint4*)(raw + slot * SLOT))[i];
        if (part == 0 && tid == 0) *(Found*)(raw + ABOUT) = ((const Found*)(raw + FOUND))[begin];
        __syncwarp();
        if (lane < 2) bar_arrive(FREE(slot));  // for the values, too
        advance<SLOTS>(slot, phase);
      }
      shared_to_copy_engine();
      named_sync(OWN, 128);
      named_arrive(QUERY_THERE, 256);
    } else {
      named_sync(QUERY_THERE, 256);
      for (int part = 0; part < QUERY_SLOTS; part++) advance<SLOTS>(slot, phase);
    }
    const int steps = uniform(((const Found*)(raw + ABOUT))->left);
    more = uniform(((const Found*)(raw + ABOUT))->item);
    if (who == 1 && steps == 1 && more) named_arrive(QUERY_FREE, 256);
    Heads h = {};
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) { h.top[i] = -inf(); h.m[i] = LOWEST; }
#pragma unroll 1
    for (int n = 0; n < steps; n++) {
      if ((n & 1) != who) {
        for (int part = 0; part < 3; part++) advance<SLOTS>(slot, phase);
        advance<2>(made, turn);
        any = true;
        continue;
      }
      const u32 begin = uniform(slot);
      float s[HEADS / 2];
      u64 keys = 0;
      hold(s);
#pragma unroll
      for (int c = 0; c < 9; c++) {
        if (c % 3 == 0) {
          bar_wait(LANDED(slot), phase, patience);
          keys = descriptor_of(base + (u32)uniform(slot) * SLOT, 16, 1024, SWIZZLE_128);
          advance<SLOTS>(slot, phase);
          wgmma_fence();
        }
#pragma unroll
        for (int k = 0; k < 4; k++) wgmma<KIND, K_MAJOR>(s, keys + c % 3 * (PART >> 4) + 2 * k, query + c * (CHUNK >> 4) + 2 * k, c || k);
      }
      wgmma_commit();
      const Found* found = (const Found*)(raw + FOUND) + begin;
      const u32 word = found->words[warp / 2] >> (16 * (warp & 1) + lane / 4);
      const int item = found->item, left = uniform(found->left);
      bar_wait(DONE(made), turn, patience);
      wgmma_wait<0>(); hold(s);
      __syncwarp();
      if (lane < 3) bar_arrive(FREE(slot_after(begin, lane)));  // for this group; the values give back what they have added
      if (who == 1 && n + 2 >= steps && more) named_arrive(QUERY_FREE, 256);
#pragma unroll
      for (int i = 0; i < HEADS / 2; i++)
        if (!(word >> (i & 2) * 4 & 1)) s[i] = -inf();
      float* factors = (float*)(raw + FACTORS) + made * HEADS;
      const bool moved = probabilities(raw, s, h, factors, p.scale2, who, warp, lane, [&] {
        if (any) bar_wait(READY(made ^ 1), made ? turn ^ 1 : turn, patience);  // the step before
        if (RARE(n && ((const Made*)(raw + MADE))[made ^ 1].reference)) follow(raw, h, lane);
      });
      store_probabilities(base + WEIGHTS + made * CHUNK, s, warp, lane);
      if (tid == 0) ((Made*)(raw + MADE))[made] = {{moved && n}, left, item, moved};
      if (RARE(left == 1)) leave_ends(raw, h, who, warp, lane);
      if (RARE(left <= 0)) finish(p, raw, Item(p, item), (float*)(raw + INVERSE) + made * HEADS, moved ? factors : nullptr, h, n > 0, who, warp, lane);
      __syncwarp();
      if (lane == 0) bar_arrive(READY(made));
      advance<2>(made, turn);
      any = true;
    }
  }
}
