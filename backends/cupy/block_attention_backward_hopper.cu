// Backward of attention over block lists by Hopper's own instructions: float16 and bfloat16, blocks of 128 x 128, five products in one pass.
//
// An item is a key block of a key head: K and V stay in shared memory, dK and dV in registers, while the query tiles that see it pass by, 64 rows a step, head after head of
// the group. dQ is summed in float32 in device memory. Items are taken by a ticket in the order of `sequence`, and every sum is added to in that same order, whatever the order
// in which an item walks its rows. So of the items not finished the one with the lowest ticket waits for nobody, and some block of threads holds it: no deadlock, however few
// blocks of threads run at once. No other order has this property: with one block of threads, items are done one after the other. The rank of an addition is the number of
// earlier items in the query tile's own list: lists made on the device need nothing more. Rows are walked from the last to the first, the order in which neighbouring items of
// windows and causal patterns come to a row without waiting; or `ascending`, its mirror image, key blocks from the last to the first and rows ascending, which spares windows and packed
// documents what waiting there is, and wants few heads at a time: their key blocks stand at different rows.
//
// Head after head, an item with fewer rows than its neighbour comes to the group's next head before it, and waits. So heads may step `abreast`, all of a group at a row before the
// next row. Of causal patterns the items of the first round (one for each block of threads) then start together at the last row and end one after the other, and those of the
// second start so: where rounds are `turning`, they walk upwards and end together. Then whoever is at work is within a few steps of the others, and finds rows and sums in the cache.
//
// Where few key blocks are seen by far more rows than others (global tokens, sinks), everybody would wait for them while they walk. They are split: each `section` of rows is an
// item of its own, taken shortly before the items that stand beside its rows, and its dK and dV are parts in device memory that `join` adds. Rows that far more key blocks
// see than others come first in every walk: items start in the order of their turns there, but do not end in it.
//
// A block of threads has six roles: a warp plans (tickets, walk, ranks, clearing of keys that nobody sees), a thread loads, two threads add dQ (one for each half of a query
// tile), two groups of 64 keys multiply. `prepare` and `finish` run before and after: what each row starts from, and dQ rounded.
// Defines: KIND, WIDTH (D rounded up to 64 or 128), VALUES (Dv likewise).
#include "wgmma.cuh"
#include "lists.cuh"
#include "ordered.cuh"

struct Params {
  TensorMap q, k, v, dout, dk, dv;  // boxes of 64 columns, 64 rows; k, v: 128 rows
  void *dq, *dk_out, *dv_out;
  const float *lse, *delta;
  float *rows, *sums;               // by head, tile and half: what `prepare` made, LINE floats; dQ as the accumulators lie
  float* parts;                     // dK and dV of sections as the accumulators lie: [B * Hk, splits, sections, 2 groups, WIDTH + VALUES, 64]
  int *turns, *ticket;              // additions done to each half tile of each sum
  int *before, *split_blocks;       // [L, nk + 1] how many split key blocks stand before each; [L, splits] which they are
  int2* sequence;                   // [L, places] key block and section (-1: all of it) in the order of tickets; key block -1: nothing
  int4* walk;                       // by list and key block, at the places of the lists by key: row, kind, rank and sum of what sees it
  const int *by_key_offsets, *by_key_rows, *by_key_kinds;
  const int* chosen;                // where in its key block's walk each entry stands (walks.py), or null: rows descending
  ListArrays lists;
  Positions at;
  int key_heads, Hq, group, D, Dv, tiles, key_tiles, together, items, most_sums, section, sections, splits, places, ascending, abreast, turning;  // key_heads = B * Hk; `together` of them are worked on at a time; rows of a section, how many there are, most split blocks of a list; whether the sequence and all walks are taken from their end, heads of a group step abreast, every other round of items walks upwards
  float scale, exponent;                                               // exponent = scale * log2(e)
};

constexpr bool ADDS = true;
#include "block_backward_hopper.cuh"

constexpr int COLUMNS = WIDTH / 2;                                                   // of dQ, a group's
constexpr int AHEAD = 16;                                                            // key blocks by which sections precede their rows: as many of a head as are under way

// Nobody waits for key blocks past the last key, which have no queries, unless they precede others: all do where rows ascend, some where key blocks are split. Then they take their turns with
// every key masked. `before`: of the list.
__device__ __forceinline__ bool all_take_turns(const Params& p, const int* before) { return p.ascending || before[p.lists.nk] > 0; }

__device__ __forceinline__ Item::Item(const Params& p, int number) {
  const int team = number / (p.together * p.places), from = team * p.together, size = imin(p.together, p.key_heads - from), rest = number - from * p.places, Hk = p.Hq / p.group;
  int2 what = make_int2(p.ascending ? p.places - 1 - rest / size : rest / size, -1);
  key_head = from + rest % size;
  b = key_head / Hk;
  hk = key_head % Hk;
  if (p.group == 1 || !p.lists.list_h) what = p.sequence[(i64)list(p, 0) * p.places + what.x];  // else lists of one group differ: as they come
  block = what.x;
  slot = -1;
  start = first_position(p.at, b);
  limit = key_limit(p.at, b);
  int2 rows = rows_of_call(p, start);
  const int* before = p.before + (i64)list(p, 0) * (p.lists.nk + 1);
  if (what.y >= 0) {
    slot = (key_head * p.splits + before[block]) * p.sections + what.y;
    rows = make_int2(imax(rows.x, what.y * p.section), imin(rows.y, what.y * p.section + p.section));
  } else if (block < 0 || block >= p.lists.nk || (block * KEYS >= limit && !all_take_turns(p, before))) {
    rows.y = 0;
  }
  first_row = rows.x;
  end_row = imax(rows.x, rows.y);
  if (p.abreast && block >= 0 && block < p.lists.nk && (p.group == 1 || !p.lists.list_h)) {
    const int* o = p.by_key_offsets + 2 * ((i64)list(p, 0) * p.lists.nk + block);
    abreast = 1;
    mirror = p.turning && number / gridDim.x & 1 ? __ldg(o) + __ldg(o + 2) : 0;
  }
}

__device__ __forceinline__ bool known_whole(const Params& p, const Item& x) { return false; }

// ------------------------------------------------------------------------------------------------------------------- adding
// dQ of step s of every tile: the first addition stores
__device__ __forceinline__ void add_sums(const Params& p, const Shared& m, int s) {
  u32 patience = PATIENCE, n = 0, turn = 0;
  for (;;) {
    const Plan x = next_plan(m, n, patience);
    if (x.state & STOP || !patience) break;
    if (x.state & EMPTY) continue;
    const i64 at = ((i64)x.row + (x.state & SECOND ? p.key_heads * p.group * p.tiles : 0)) * 2 + s;
    wait_turn(p.turns + at, x.rank, patience);
    bar_wait(m.full_sums(s), turn, patience);
    turn ^= 1;
    if (x.rank == 0) bulk_store(p.sums + at * (SUMS / 4), m.sums + s * SUMS, SUMS); else bulk_add(p.sums + at * (SUMS / 4), m.sums + s * SUMS, SUMS);
    tma_store_commit();
    tma_store_wait_read();
    bar_arrive(m.free_sums(s));
    tma_store_wait();
    end_turn(p.turns + at, x.rank);
  }
}

// ---------------------------------------------------------------------------------------------------------------- multiplying
// this group's keys of a section: dK and dV as the accumulators lie
__device__ __forceinline__ void write_part(const Params& p, int slot, int w, const float (&dk)[WIDTH / 2], const float (&dv)[VALUES / 2]) {
  float4* part = (float4*)p.parts + ((i64)slot * 2 + w) * ((WIDTH + VALUES) * 16) + thread_again() % 128;
#pragma unroll
  for (int j = 0; j < WIDTH / 8; j++) part[j * 128] = make_float4(dk[4 * j], dk[4 * j + 1], dk[4 * j + 2], dk[4 * j + 3]);
#pragma unroll
  for (int j = 0; j < VALUES / 8; j++) part[(WIDTH / 8 + j) * 128] = make_float4(dv[4 * j], dv[4 * j + 1], dv[4 * j + 2], dv[4 * j + 3]);
}

__device__ __forceinline__ void multiply_items(const Params& p, const Shared& m, int w) {
  const int tid = threadIdx.x % 128, lane = tid & 31, warp = tid / 32;
  u32 patience = PATIENCE;
  float s[32], dp[32], own[WIDTH == 128 ? 1 : COLUMNS / 2], dk[WIDTH / 2], dv[VALUES / 2];
  float (&dq)[COLUMNS / 2] = *(float(*)[COLUMNS / 2])(WIDTH == 128 ? dp : own);  // of the step before: done with before dP begins, so they may share registers
  u32 pr[16], ds[16], turn_keys = 0, n = 0, plan = 0;                     // n: steps
  int kind = 0, state = 0;                                                // of the tile: read while the products of the step before run
  const u32 ds_at = m.ds + w * PART + ((lane >> 4) * 8 + (lane & 7)) * 128 + (((warp * 2 + (lane >> 3 & 1)) ^ (lane & 7)) << 4);
  const u32 sums_at = m.sums + w * (SUMS / 2) + tid * 16, rows_at = m.rows + (lane & 3) * 8;
  const auto field = [&](int of) { return __shfl_sync(~0u, shared_int(m.plan_at(plan, of)), 0); };
  const auto release = [&] { if (thread_again() % 128 == 0) bar_arrive(m.free_plan(plan)); plan++; };
  const auto open = [&] {
    bar_wait(m.full_plan(plan), plan / PLANS & 1, patience);
    kind = field(KIND_OF);
    state = field(STATE);
  };
  const auto begin = [&](u32 b, u32 turn) {
    bar_wait(m.full_q(b), turn, patience);
    start_from(s, rows_at + b * LINE * 4);
  };
  const auto multiply_dq = [&](u32 b, u32 turn) {
    bar_wait(m.full_ds(b), turn, patience);
    wgmma_fence();
    const u32 first = uniform(w) * COLUMNS;
    const u64 a = descriptor(m.ds + b * 2 * PART), b_k = descriptor_columns<SLAB>(m.k + first / 64 * SLAB + first % 64 * 2);
#pragma unroll
    for (int c = 0; c < 8; c++) wgmma<KIND, N_MAJOR>(dq, a + c / 4 * (PART >> 4) + c % 4 * 2, b_k + c * 128, c != 0);
    wgmma_commit();
  };
  const auto write_dq = [&](u32 b) {
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++) shared_store(sums_at + b * SUMS + j * 2048, dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
  };
  // One step is 64 queries; b is its stage, and which half of the tile it is. dQ is that of the step before: the groups may drift apart by a step.
  const auto step = [&](const bool first) __attribute__((always_inline)) {
    const u32 b = uniform(n & 1), own = uniform(w) * 64 * 128, turn = n >> 1 & 1, before = (n - 1) >> 1 & 1;  // uniform here: what is kept from before the loop is not, and costs two instructions a product
    hold(s);
    wgmma_fence();
    const u64 a_k = descriptor(m.k + own), a_v = descriptor(m.v + own), b_q = descriptor(m.q + b * Q_PARTS * PART);
#pragma unroll
    for (int c = 0; c < WIDTH / 16; c++) wgmma<KIND, K_MAJOR>(s, a_k + c / 4 * (SLAB >> 4) + c % 4 * 2, b_q + c / 4 * (PART >> 4) + c % 4 * 2, 1);
    wgmma_commit();
    const int left = state >> 8;
    const bool more = !(b && state & LAST);
    const int4 rows = load_mask(p.lists, kind, b * STEP);
    if (!first) multiply_dq(b ^ 1, before);
    const int far = uniform(shared_int(m.rows + b * LINE * 4 + 3 * STEP * 4));
    if (first) wgmma_wait<0>(); else wgmma_wait<1>();
    hold(s);
    float c = p.exponent;
    if (far) {  // the score is rounded as in the forward, so that score - lse is right however large both are
      c = 1.f;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float2 lse = shared_pair(rows_at + b * LINE * 4 + 2 * STEP * 4 + j * 32);
#pragma unroll
        for (int e = 0; e < 4; e++) s[4 * j + e] = (__fmul_rn(s[4 * j + e], p.scale) - (e & 1 ? lse.y : lse.x)) * LOG2E;
      }
    }
    if (kind >= 0 || left < KEYS) mask(s, rows, kind, left);
#pragma unroll
    for (int j = 0; j < 16; j++) {
      s[2 * j] = ex2(s[2 * j] * c); s[2 * j + 1] = ex2(s[2 * j + 1] * c);
      pr[j] = pack<KIND>(s[2 * j], s[2 * j + 1]);
    }
    if (!first) {
      bar_wait(m.free_sums(b ^ 1), before ^ 1, patience);
      u32 any = 0;
#pragma unroll
      for (int j = 0; j < 16; j++) any |= pr[j];
      if (any & 0x80008000u) bar_wait(m.full_q(b), turn, patience);  // never: probabilities have no sign; a branch that needs them keeps the exponentials before the wait
      wgmma_wait<0>();
      hold(dq);
      write_dq(b ^ 1);
    }
    start_from(dp, rows_at + b * LINE * 4 + STEP * 4);
    hold(dp); hold(dv);
    wgmma_fence();
    const u64 b_do = descriptor(m.dout + b * V_PARTS * PART), q_rows = descriptor_columns<PART>(m.q + b * Q_PARTS * PART), do_rows = descriptor_columns<PART>(m.dout + b * V_PARTS * PART);
#pragma unroll
    for (int c = 0; c < VALUES / 16; c++) wgmma<KIND, K_MAJOR>(dp, a_v + c / 4 * (SLAB >> 4) + c % 4 * 2, b_do + c / 4 * (PART >> 4) + c % 4 * 2, 1);
    wgmma_commit();
#pragma unroll
    for (int c = 0; c < 4; c++) wgmma<KIND, N_MAJOR>(dv, pr + 4 * c, do_rows + c * 128, !first || c != 0);
    wgmma_commit();
    wgmma_wait<1>();
    hold(dp);
#pragma unroll
    for (int j = 0; j < 16; j++) ds[j] = pack<KIND>(s[2 * j] * dp[2 * j], s[2 * j + 1] * dp[2 * j + 1]);
    // as [query][key]; the buffer is free: the other group wrote dS of the step before only after its dQ of the step before that
#pragma unroll
    for (int g = 0; g < 4; g++) stmatrix_transposed_at(ds_at + b * 2 * PART + g * 2048, ds[4 * g], ds[4 * g + 1], ds[4 * g + 2], ds[4 * g + 3]);
    hold(dk);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < 4; c++) wgmma<KIND, N_MAJOR>(dk, ds + 4 * c, q_rows + c * 128, !first || c != 0);
    wgmma_commit();
    shared_to_copy_engine();  // dS, and dQ of the step before
    __syncwarp();
    if (thread_again() % 32 == 0) { bar_arrive(m.full_ds(b)); if (!first) bar_arrive(m.full_sums(b ^ 1)); }
    if (more) {
      if (b) { release(); open(); }
      begin(b ^ 1, (n + 1) >> 1 & 1);
    }
    wgmma_wait<0>();
    hold(dk); hold(dv);
    if (thread_again() % 128 == 0) bar_arrive(m.free_q(b));
    n++;
    return more;
  };
  for (;;) {
    open();
    if (state & STOP) break;
    if (state & EMPTY) {
      store_nothing(p, field(KEY_HEAD), field(BLOCK) * KEYS + 64 * w, thread_again() % 128);
      named_sync(4 + w, 128);
      release();
      continue;
    }
    bar_wait(m.full_keys(), turn_keys, patience);
    turn_keys ^= 1;
    begin(0, n >> 1 & 1);
    step(true);
    while (step(false)) {}
    hold(dq);
    multiply_dq(1, (n - 1) >> 1 & 1);
    bar_wait(m.free_sums(1), ((n - 1) >> 1 & 1) ^ 1, patience);
    wgmma_wait<0>();
    hold(dq);
    write_dq(1);
    shared_to_copy_engine();
    __syncwarp();
    if (thread_again() % 32 == 0) bar_arrive(m.full_sums(1));
    named_sync(1, 256);  // neither group reads the key tile any more
    const int tid = thread_again() % 128, lane = tid & 31, row = w * 64 + tid / 32 * 16 + (lane & 15), block = field(BLOCK), key_head = field(KEY_HEAD);
    const bool section = state & SECTION;
    if (section) {
      write_part(p, key_head, w, dk, dv);
    } else {
      write_keys(dk, p.scale, m.k, row, lane);
      write_keys(dv, 1.f, m.v, row, lane);
      shared_to_copy_engine();
    }
    named_sync(4 + w, 128);
    release();
    if (tid == 0) {
      if (!section) {
        for (int c = 0; c < Q_PARTS; c++) tma_store(&p.dk, m.k + c * SLAB + w * PART, 64 * c, block * KEYS + 64 * w, key_head);
        for (int c = 0; c < V_PARTS; c++) tma_store(&p.dv, m.v + c * SLAB + w * PART, 64 * c, block * KEYS + 64 * w, key_head);
        tma_store_commit();
        tma_store_wait_read();
      }
      bar_arrive(m.free_keys());
    }
  }
  if (thread_again() % 128 == 0) tma_store_wait();
}

extern "C" __global__ void __launch_bounds__(384, 1) backward(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  const Shared m(raw);
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; s++) {
      bar_init(m.full_q(s), 1); bar_init(m.free_q(s), 2);
      bar_init(m.full_ds(s), 8);
      bar_init(m.full_sums(s), 8); bar_init(m.free_sums(s), 1);
    }
    for (int s = 0; s < PLANS; s++) { bar_init(m.full_plan(s), 1); bar_init(m.free_plan(s), READERS); }
    bar_init(m.full_keys(), 1); bar_init(m.free_keys(), 2); bar_init(m.landed(), 1);
    bar_fence();
  }
  __syncthreads();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (group == 0) {
    fewer_registers<24>();
    const int warp = threadIdx.x / 32;
    if (warp == 3) plan_items(p, m);
    else if (threadIdx.x == 0) load_items(p, m);
    else if (threadIdx.x == 32 || threadIdx.x == 64) add_sums(p, m, warp - 1);
  } else {
    more_registers<240>();
    multiply_items(p, m, group - 1);
  }
}

// ------------------------------------------------------------------------------------------------------------- before and after
// What each row starts from; counters start at 0.
extern "C" __global__ void __launch_bounds__(STEP) prepare(const __grid_constant__ Params p) {
  start_rows(p);
  if (threadIdx.x == 0) {
    for (int n = 0; n < p.most_sums; n++) p.turns[n * (i64)gridDim.x + blockIdx.x] = 0;
    if (blockIdx.x == 0) *p.ticket = 0;
  }
}

// of the entries by key or by row that a list has in all, and one of its n lines has `count`: are these far more than others have?
__device__ __forceinline__ bool is_long(int count, int n, i64 all) { return count > 16 && (i64)count * n > 4 * all; }

// which of two sums key block c adds to: where rows are long, even and odd ones have a sum each
__device__ __forceinline__ int sum_of(const Params& p, int list, int c) {
  const int* o = p.by_key_offsets + 2 * (i64)list * p.lists.nk;
  return p.most_sums > 1 && __ldg(o + 2 * p.lists.nk) - __ldg(o) > 24 * (i64)p.lists.nk ? c & 1 : 0;
}

// the key block before which sections g of split key blocks are taken
__device__ __forceinline__ int anchor(const Params& p, int g) { return clamp(p.lists.first + g * p.section - AHEAD, 0, imin(p.lists.nk, p.key_tiles)); }

// Which key blocks are split, and the sequence of items: whole key blocks ascending, before each the sections anchored there. One warp a list.
extern "C" __global__ void __launch_bounds__(32) classify(const __grid_constant__ Params p) {
  const int lane = threadIdx.x, nk = p.lists.nk, n = imin(nk, p.key_tiles);
  const int* o = p.by_key_offsets + 2 * (i64)blockIdx.x * nk;
  int *before = p.before + (i64)blockIdx.x * (nk + 1), *blocks = p.split_blocks + (i64)blockIdx.x * p.splits;
  int2* sequence = p.sequence + (i64)blockIdx.x * p.places;
  const i64 all = __ldg(o + 2 * nk) - __ldg(o);
  const auto splits = [&](int j) { return j < n && is_long(__ldg(o + 2 * j + 2) - __ldg(o + 2 * j), nk, all); };
  int found = 0;
  for (int j = 0; j < n; j += 32) found += __popc(__ballot_sync(~0u, splits(j + lane)));
  if (found > p.splits) found = 0;
  for (int j0 = 0, earlier = 0; j0 <= nk; j0 += 32) {
    const int j = j0 + lane;
    const bool mine = found && splits(j);
    const u32 them = __ballot_sync(~0u, mine);
    const int at = earlier + __popc(them & ((1u << lane) - 1));
    if (j <= nk) before[j] = at;
    if (mine) blocks[at] = j;
    earlier += __popc(them);
  }
  __syncwarp();
  for (int x = lane; x < p.places; x += 32) sequence[x] = make_int2(-1, -1);
  __syncwarp();
  for (int j = lane; j < p.key_tiles; j += 32) {
    const int sections = j < n ? clamp(floor_div(j + AHEAD - p.lists.first, p.section) + 1, 0, p.sections) : p.sections;  // anchored at j or before
    if (j >= n || before[j] == before[j + 1]) sequence[j - (j < n ? before[j] : found) + found * sections] = make_int2(j, -1);
  }
  for (int x = lane; x < found * p.sections; x += 32) {
    const int a = anchor(p, x / found);
    sequence[x + a - before[a]] = make_int2(blocks[x % found], x / found);
  }
}

// The walk of one key block of one list: full and partial entries as one, as chosen, or rows descending but those first that far more key blocks see than others, each with its
// rank among the additions to the same sum of that row. Walks of split key blocks only descend: long as they are, they are cut.
extern "C" __global__ void __launch_bounds__(128) order(const __grid_constant__ Params p) {
  const int list = blockIdx.x / p.lists.nk, j = blockIdx.x % p.lists.nk, nk = p.lists.nk, nq = p.lists.nq;
  const int *o = p.by_key_offsets + 2 * (i64)blockIdx.x, *cols = p.lists.cols, *before = p.before + (i64)list * (nk + 1), *rows = p.lists.offsets + 2 * (i64)list * nq;
  const int from = __ldg(o), middle = __ldg(o + 1), end = __ldg(o + 2), sum = sum_of(p, list, j);
  const i64 all = __ldg(rows + 2 * nq) - __ldg(rows);
  const bool apart = before[nk] > 0, split = before[j] < before[j + 1];
  const auto turn = [&](int c, int i) { return before[c] < before[c + 1] ? 2 * anchor(p, i / p.section) : 2 * c + 1; };  // of key block c at row i; among split ones the earlier first
  const auto busy = [&](int i) { return apart && !split && is_long(__ldg(rows + 2 * i + 2) - __ldg(rows + 2 * i), nq, all); };
  for (int e = from + threadIdx.x; e < end; e += 128) {
    const int i = __ldg(p.by_key_rows + e), mine = turn(j, i);
    int after = e < middle ? middle - 1 - e + (end - middle) - count_below(p.by_key_rows + middle, end - middle, i)
                           : end - 1 - e + (middle - from) - count_below(p.by_key_rows + from, middle - from, i);
    const bool first = busy(i);
    for (int x = from; apart && !split && !p.chosen && x < end; x++) {
      const int other = __ldg(p.by_key_rows + x);
      if (busy(other) != first) after += first ? -(other > i) : other < i;
    }
    int rank = 0;
    for (int x = __ldg(rows + 2 * i), y = __ldg(rows + 2 * i + 2); x < y; x++) {
      const int c = __ldg(cols + x), its = turn(c, i);
      const bool earlier = its < mine || (its == mine && c < j);
      rank += c != j && earlier != (p.ascending != 0) && c < p.key_tiles && sum_of(p, list, c) == sum;
    }
    if (p.chosen) after = __ldg(p.chosen + e);
    if (p.ascending) after = end - from - 1 - after;
    p.walk[from + after] = make_int4(i, e < middle ? -1 : __ldg(p.by_key_kinds + e), rank, sum);
  }
}

// dK and dV of split key blocks: the parts of sections, summed in their order. A block of threads takes 64 keys, 64 columns of dK or dV.
extern "C" __global__ void __launch_bounds__(128) join(const __grid_constant__ Params p) {
  constexpr int CHUNKS = Q_PARTS + V_PARTS;
  const int chunk = blockIdx.x % CHUNKS, w = blockIdx.x / CHUNKS % 2, which = blockIdx.x / CHUNKS / 2, key_head = which / p.splits, tid = threadIdx.x, lane = tid & 31;
  const int Hk = p.Hq / p.group, b = key_head / Hk, list = __ldg(p.lists.list_of + b * p.lists.list_b + key_head % Hk * p.group * p.lists.list_h);
  if (which % p.splits >= p.before[(i64)list * (p.lists.nk + 1) + p.lists.nk]) return;
  const int block = p.split_blocks[(i64)list * p.splits + which % p.splits];
  const int* o = p.by_key_offsets + 2 * ((i64)list * p.lists.nk + block);
  const int from = __ldg(o), middle = __ldg(o + 1), end = __ldg(o + 2);
  const int2 rows = rows_of_call(p, first_position(p.at, b));
  const auto earlier = [&](int row) { return count_below(p.by_key_rows + from, middle - from, row) + count_below(p.by_key_rows + middle, end - middle, row); };
  const float4* part = (const float4*)p.parts + ((i64)which * p.sections * 2 + w) * ((WIDTH + VALUES) * 16) + chunk * 1024 + tid;
  float4 sum[8];
#pragma unroll
  for (int j = 0; j < 8; j++) sum[j] = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int g0 = 0; g0 < p.sections; g0 += 32) {
    const int first = imax((g0 + lane) * p.section, rows.x), past = imin((g0 + lane + 1) * p.section, rows.y);
    u32 some = __ballot_sync(~0u, g0 + lane < p.sections && first < past && earlier(first) < earlier(past));  // the others have no part
    for (; some; some &= some - 1) {
      const float4* x = part + (i64)(g0 + __ffs(some) - 1) * ((WIDTH + VALUES) * 32);
#pragma unroll
      for (int j = 0; j < 8; j++) sum[j] = make_float4(sum[j].x + x[j * 128].x, sum[j].y + x[j * 128].y, sum[j].z + x[j * 128].z, sum[j].w + x[j * 128].w);
    }
  }
  const bool keys = chunk < Q_PARTS;
  const int width = keys ? p.D : p.Dv, s = block * KEYS + w * 64 + tid / 32 * 16 + lane / 4, c0 = (keys ? chunk : chunk - Q_PARTS) * 64 + lane % 4 * 2;
  const float scale = keys ? p.scale : 1.f;
  u32* out = (u32*)(keys ? p.dk_out : p.dv_out);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const i64 at = (((i64)key_head * p.at.S + s) * width + c0 + 8 * j) / 2;
    if (c0 + 8 * j < width && s < p.at.S) out[at] = pack<KIND>(sum[j].x * scale, sum[j].y * scale);
    if (c0 + 8 * j < width && s + 8 < p.at.S) out[at + 4 * width] = pack<KIND>(sum[j].z * scale, sum[j].w * scale);
  }
}

// dQ of a step of 64 rows, rounded; tiles whose list is empty were never added to
extern "C" __global__ void __launch_bounds__(256) finish(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  constexpr int PITCH = WIDTH / 2 + 4;
  u32* out = (u32*)raw;  // [STEP][PITCH] pairs
  const int half = blockIdx.x & 1, tile = blockIdx.x / 2 % p.tiles, head = blockIdx.x / 2 / p.tiles, b = head / p.Hq, start = first_position(p.at, b), first = floor_div(start, ROWS) + tile;
  const int w = threadIdx.x / 128, tid = threadIdx.x % 128, row = tid / 32 * 16 + tid % 32 / 4, i = first - p.lists.first, limit = key_limit(p.at, b);
  int some = 0;  // bit n: something was added to sum n
  if (i >= 0 && i < p.lists.nq) {
    const int list = __ldg(p.lists.list_of + b * p.lists.list_b + head % p.Hq * p.lists.list_h);
    const int* o = p.lists.offsets + 2 * ((i64)list * p.lists.nq + i);
    const int end = __ldg(o + 2);
    const bool all = all_take_turns(p, p.before + (i64)list * (p.lists.nk + 1));
    for (int e = __ldg(o) + threadIdx.x; e < end; e += 256) {
      const int c = __ldg(p.lists.cols + e);
      if (c < p.key_tiles && (c * KEYS < limit || all)) some |= 1 << sum_of(p, list, c);
    }
  }
  const bool first_sum = __syncthreads_or(some & 1), second_sum = __syncthreads_or(some & 2);
  const float4* sums = (const float4*)p.sums + ((i64)blockIdx.x * 2 + w) * (SUMS / 32) + tid;
  const i64 next = (i64)gridDim.x * (SUMS / 16);
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; j++) {
    float4 x = first_sum ? sums[j * 128] : make_float4(0.f, 0.f, 0.f, 0.f);
    if (second_sum) {
      const float4 y = sums[next + j * 128];
      x = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
    }
    const int c = w * (COLUMNS / 2) + 4 * j + tid % 4;
    out[row * PITCH + c] = pack<KIND>(x.x * p.scale, x.y * p.scale);
    out[(row + 8) * PITCH + c] = pack<KIND>(x.z * p.scale, x.w * p.scale);
  }
  __syncthreads();
  const int n = p.D / 8, t0 = first * ROWS - start + half * STEP;
  for (int k = threadIdx.x; k < STEP * n; k += 256) {
    const int r = k / n, t = t0 + r;
    if (t >= 0 && t < p.at.T) ((uint4*)p.dq)[((i64)head * p.at.T + t) * n + k % n] = *(const uint4*)(out + r * PITCH + k % n * 4);
  }
}
