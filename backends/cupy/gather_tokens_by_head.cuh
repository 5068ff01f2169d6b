// Scores and probabilities of 64 tokens with heads as the rows of the product (gather_tokens_hopper.cu, 32 heads): S [2 x 32, 64 tokens] = Q K^T. Each head is two rows, which take two of
// every four columns each (wgmma_pairs): no row is empty, and a product covers 32 columns. The query stands in registers for an item, so that shared memory is read for the keys alone,
// and a thread makes probabilities of one head, both of whose rows it has and which no other warp has to hear of. They are made while the next step's first products, asked for before,
// are on their way.
#pragma once

constexpr int AHEAD = 3;  // of the nine parts of the next step those whose products are asked for first: they are the slot that lands first

// Of a lane's head: the largest product this lane has seen, the reference m of the sums (powers of two), the sum of this lane's tokens.
struct Head { float top, m, sum; bool wide; };

// The four lanes of a head
__device__ __forceinline__ float largest_of(float x) { x = fmaxf(x, __shfl_xor_sync(~0u, x, 1)); return fmaxf(x, __shfl_xor_sync(~0u, x, 2)); }
__device__ __forceinline__ float sum_of(float x) { x += __shfl_xor_sync(~0u, x, 1); return x + __shfl_xor_sync(~0u, x, 2); }

// Products of 64 tokens become probabilities relative to 2^m (latent_hopper.cuh has the reasons). Whether a reference moved: then `factor` is for what was summed before.
__device__ __forceinline__ bool probabilities(float (&s)[N / 4], Head& h, float& factor, float scale2) {
#pragma unroll
  for (int c = 0; c < 8; c++) h.top = fmaxf(h.top, fmaxf(s[2 * c], s[2 * c + 1]));
  factor = 1.f;
  const bool moved = __any_sync(~0u, fmaf(h.top, scale2, -LAZY) > h.m);
  if (moved) {
    h.top = largest_of(h.top);
    const float m = __fmul_rn(h.top, scale2);
    if (m > h.m) {
      factor = ex2(h.m - m);
      h.m = m;
      h.sum *= factor;
    }
    h.wide = __any_sync(~0u, fabsf(h.m) > WIDE && h.top != -inf());
  }
  float unit = scale2;
  if (h.wide) {
    unit = 1.f;
#pragma unroll
    for (int i = 0; i < N / 4; i++) s[i] = __fmul_rn(s[i], scale2);
  }
#pragma unroll
  for (int i = 0; i < N / 4; i++) {
    s[i] = ex2(fmaf(s[i], unit, -h.m));
    h.sum += s[i];
  }
  return moved;
}

// At the end of an item: sums relative to 2^m become sums relative to the head's largest score, in natural units and rounded once as the backward does.
__device__ __forceinline__ void finish(const Params& p, const Item& x, float* inverse, const Head& h, int head, int lane) {
  const float top = largest_of(h.top), sum = sum_of(h.sum);
  if (lane & 3) return;
  const bool empty = top == -inf() && sum == 0.f;
  const float ahead = h.wide ? __fmul_rn(top, p.scale2) - h.m : fmaf(top, p.scale2, -h.m), largest = __fmul_rn(top, p.scale), unit = ex2(-ahead), total = sum * unit;
  const float sink = p.sink && head < x.rows ? ex2((__ldg(p.sink + x.head + head) - largest) * LOG2E) : 0.f;
  inverse[head] = empty ? 0.f : total / ((total + sink) * with_rounded<KIND>(sum, ex2(ahead)));
  if (p.lse && head < x.rows) p.lse[((i64)x.b * p.Hq + x.head + head) * p.at.T + x.t] = empty ? -inf() : largest + logf(total);
}

// Probabilities of a warp's heads, 64 tokens a row: K-major for the second product
__device__ __forceinline__ void store_probabilities(u32 weights, const float (&s)[N / 4], int warp, int lane) {
  const u32 row = lane & 7, to = weights + warp * 1024 + row * 128;
#pragma unroll
  for (int c = 0; c < 8; c += 4)
    stmatrix_at(to + ((c + (lane >> 3) ^ row) << 4), pack<KIND>(s[2 * c], s[2 * c + 1]), pack<KIND>(s[2 * c + 2], s[2 * c + 3]), pack<KIND>(s[2 * c + 4], s[2 * c + 5]),
                pack<KIND>(s[2 * c + 6], s[2 * c + 7]));
}

// The query of a warp's heads from the ring: A of the products over 32 columns each, as wgmma_pairs asks for it
__device__ __forceinline__ void take_query(const unsigned char* raw, u32 begin, u32 (&q)[18][4], int warp, int lane) {
  const u32 row = lane / 4, here = (warp * 8 + row) * 128 + (lane & 1) * 8;
#pragma unroll
  for (int k = 0; k < 18; k++) {
    const u32 from = here + part_after(begin, k / 2 * HEADS / N) + k / 2 * HEADS % N * 128;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint2 x = *(const uint2*)(raw + from + ((k % 2 * 4 + i * 2 + (lane & 3) / 2 ^ row) << 4));
      q[k][2 * i] = x.x; q[k][2 * i + 1] = x.y;
    }
  }
}

__device__ __forceinline__ void scores(const Params& p, unsigned char* raw, u32 base, u32 bars, int) {
  const int tid = threadIdx.x % 128, warp = uniform(tid / 32), lane = tid & 31, head = warp * 8 + lane / 4;
  u32 slot = 0, phase = 0, made = 0, turn = 1, patience = PATIENCE, landed = 0, done = 0;
  for (int left = 0; left >= 0;) {
    const u32 first_slot = slot;
    for (int n = 0; n < QUERY_SLOTS; n++) {
      bar_wait_unless(landed, LANDED(slot), phase, patience);
      advance<SLOTS>(slot, phase);
      landed = bar_test(LANDED(slot), phase);
    }
    u32 q[18][4];
    take_query(raw, first_slot, q, warp, lane);
    __syncwarp();
    if (lane < 2)  // for the other group, too
      for (int n = 0; n < QUERY_SLOTS; n++) bar_arrive(FREE(slot_after(first_slot, n)));
    Head h = {-inf(), LOWEST, 0.f, false};
    bool first = true;
    float s[N / 4];  // of the step before, of which the probabilities are still to be made
    int item = 0;
    const auto soften = [&](bool last) {
      bar_wait_unless(done, DONE(made), turn, patience);
      Made& step = ((Made*)(raw + MADE))[made];
      float factor;
      const bool moved = probabilities(s, h, factor, p.scale2);
      store_probabilities(base + WEIGHTS + made * CHUNK, s, warp, lane);
      if (lane % 4 == 0) ((float*)(raw + FACTORS))[made * HEADS + head] = factor;
      if (lane == 0) step.moved[warp] = moved && !first;
      if (tid == 0) { step.left = left; step.item = item; }
      if (last) finish(p, Item(p, item), (float*)(raw + INVERSE) + made * HEADS, h, head, lane);
      __syncwarp();
      if (lane == 0) bar_arrive(READY(made));
      advance<2>(made, turn);
      first = false;
    };
    for (bool more = true, before = false; more; before = true) {
      const u32 begin = uniform(slot);
      u64 keys[3];
#pragma unroll
      for (int i = 0; i < 3; i++) keys[i] = descriptor_of(base + slot_after(begin, i) * SLOT, 16, 1024, SWIZZLE_128);
      float next[N / 2];
      hold(next);
#pragma unroll
      for (int c = 0; c < 9; c++) {
        if (c == AHEAD && before) soften(false);
        if (c % 3 == 0) {
          bar_wait_unless(landed, LANDED(slot), phase, patience);
          advance<SLOTS>(slot, phase);
          landed = bar_test(LANDED(slot), phase);
          if (c == 0) done = bar_test(DONE(made), turn);
        }
        if (c % 3 == 0 || c == AHEAD) wgmma_fence();
#pragma unroll
        for (int k = 0; k < 2; k++) wgmma_pairs<KIND>(next, q[2 * c + k], keys[c / 3] + c % 3 * (PART >> 4) + 4 * k, c || k);
      }
      wgmma_commit();
      const Found found = ((const Found*)(raw + FOUND))[begin];
      item = found.item;
      left = uniform(found.left);
      wgmma_wait<0>(); hold(next);
      __syncwarp();
      if (lane < 3) bar_arrive(FREE(slot_after(begin, lane)));  // for this group; the other gives back what it has added
#pragma unroll
      for (int i = 0; i < N / 4; i++) s[i] = next[i / 2 * 4 + i % 2] + next[i / 2 * 4 + 2 + i % 2];  // a head's two rows
      if ((found.words[0] & found.words[1]) != ~0u) {
#pragma unroll
        for (int i = 0; i < N / 4; i++)
          if (!(found.words[i / 8] >> (i / 2 % 4 * 8 + 2 * (lane & 3) + i % 2) & 1)) s[i] = -inf();
      }
      more = left > 0;
    }
    done = 0;
    soften(true);
  }
}
