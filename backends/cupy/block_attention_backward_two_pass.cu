// Backward of attention over block lists by Hopper's own instructions in two passes: float16 and bfloat16, blocks of 128 x 128, five products and no additions in device memory.
//
// `backward`: an item is a key block of a key head, or a section of one that far more rows see: K and V stay in shared memory, dK and dV in registers, while the query tiles that see
// it pass by, 64 rows a step. A group of 64 keys passes over steps whose rows see none of them. What would be dQ's operand, dS in 16 bits, leaves as it stands in shared memory, and so
// does the key block (keys that nobody sees are zero there). `join` adds up sections. `queries`: an item is a query tile; dQ is its blocks of dS times theirs of K, in registers, in the
// order of its list. Nobody waits for anybody: items are taken by ticket, the longest first, and the sums are the same every time.
//
// dS of everything would be T x S memory. Heads, or key blocks of a head, are worked on in pieces that fit a fixed amount; where a head comes in pieces, dQ stands in float32 between them.
//
// Beside block_attention_backward_hopper.cu this reads dS and K once more (64 KB a block of 128 x 128 at D 128), needs no turns, no float32 sums, and has the registers for D up to 192.
// PARTED: one part of a layout of several (parts.cuh). A piece's dQ, dK and dV stand in float32 between its parts; the last one adds its own and rounds.
// Defines: KIND, WIDTH (D rounded up to 64, 128 or 192), VALUES (Dv rounded up to 64 or 128), PARTED.
#include "wgmma.cuh"
#include "parts.cuh"
#include "ordered.cuh"

struct Params {
#if PARTED
  TensorMap q[2], k[2], v[2], dout[2];  // of the shorter classes, of the longer ones (view_of)
#else
  TensorMap q, k, v, dout;          // boxes of 64 columns, 64 rows; k, v: 128 rows
#endif
  void *dq, *dk_out, *dv_out;
  const float *lse, *delta;
  float *rows, *sums;               // by head, tile and half: what `prepare` made, LINE floats; dQ between pieces as the accumulators lie, by head of the piece, or null
  unsigned char *slopes, *keys;     // of the piece: dS by head and entry, halves of queries, halves of keys; key blocks by key head
  int *ticket, *blocks, *tiles_of;  // the piece's two; [L, key_tiles], [L, nq]: key blocks of each piece, and query tiles, the longest first
  int* whole;                       // [L, nk] 1 where whole query tiles see every key of a block
  int4* walk;                       // by list and key block, at the places of the lists by key: row, kind, place in the piece, quarters seen and from bit 4 on seen entirely
  int* place;                       // by list and query tile, at the places of the lists: where dS of that block stands, and in the lowest 4 bits which quarters are seen
  unsigned char* quarters;          // by kind and half of the rows: which halves of the keys are seen, from bit 2 on seen entirely
  const int *by_key_offsets, *by_key_rows, *by_key_kinds;
  ListArrays lists;
  Positions at;
  int Hq, group, D, Dv, tiles, key_tiles, outside;                // outside: query tiles of the call that the lists may lack
  int together, ahead, ahead_rows;                                // `together` key heads are worked on at a time, once the `ahead` longest items of all are taken
  int pieces, from_head, heads, from_block, piece_blocks, most;   // key heads and key blocks of the piece; most entries of one head in a piece
  int items;                                                      // of `backward`
  int row_step, key_step, key_run;                                // of a part, else 1, KEYS, KEYS
  int adds, rounds;                                               // of a part: whether dQ (1), dK and dV (2) are added to what the wide ones hold, and whether the sums are rounded
  float scale, exponent;                                          // exponent = scale * log2(e)
  int halves, intervals;                                          // of query tiles; of the kinds of partial blocks, how many are intervals
  int sections, cut;                                              // the `cut` longest key blocks of a key head come in so many items, each with some of the rows; `join` adds up their dK and dV
  float* sums_of_keys;                                            // by head of the piece, rank of the key block and section: [128, WIDTH], then all the same of dV [128, VALUES]
  const u32* held;                                                // bits of the keys whose dK and dV the wide ones hold, or null: all
  float *wide_dq, *wide_dk, *wide_dv;                             // of a part: [heads, T, WIDTH], [heads, S, WIDTH], [heads, S, VALUES] of the piece (start_part)
};

constexpr bool ADDS = false;
#include "block_backward_hopper.cuh"

constexpr int BLOCK_BYTES = 4 * PART, KEY_BYTES = Q_PARTS * SLAB, STAGE = (2 + Q_PARTS) * PART, STAGES = 20 * PART / STAGE, ITEMS = 2;  // a stage: 64 keys and their dS for 128 queries
constexpr int PITCH = WIDTH / 2 + 4;   // of dQ on its way out, in pairs

// (head, rank) of an item among `heads` times n: the `ahead` longest of all heads, then so many heads at a time as share the cache
__device__ __forceinline__ int2 turn_of(int number, int heads, int n, int ahead, int together) {
  if (number < ahead * heads) return make_int2(number % heads, number / heads);
  const int each = n - ahead, m = number - ahead * heads, from = m / (together * each) * together, size = imin(together, heads - from), rest = m - from * each;
  return make_int2(from + rest % size, ahead + rest / size);
}

// the key block of a rank among a list's: the longest first, or as they come where lists of one group differ
__device__ __forceinline__ int block_of(const Params& p, int list, int rank) {
  return p.lists.nk && (p.group == 1 || !p.lists.list_h) ? __ldg(p.blocks + (i64)list * p.key_tiles + rank) : rank;
}

__device__ __forceinline__ Item::Item(const Params& p, int number) {
  const int Hk = p.Hq / p.group, cut = p.cut * p.sections;
  const int2 turn = turn_of(number, p.heads, p.items / p.heads, p.ahead, p.together);
  key_head = p.from_head + turn.x;
  b = key_head / Hk;
  hk = key_head % Hk;
  block = block_of(p, list(p, 0), p.from_block + (turn.y < cut ? turn.y / p.sections : turn.y - cut + p.cut));
  slot = turn.y < cut ? turn.x * cut + turn.y : -1;
  first_of_section = p.lists.nq * (turn.y % p.sections) / p.sections;
  end_of_section = p.lists.nq * (turn.y % p.sections + 1) / p.sections;
  start = first_position(p.at, b);
  limit = key_limit(p.at, b);
  const int2 rows = rows_of_call(p, start);
  first_row = rows.x;
  end_row = block < p.lists.nk && (PARTED || block * KEYS < limit) ? imax(rows.x, rows.y) : first_row;  // blocks of a part do not ascend: those behind the last key are masked
}

// What `arrange` found holds where the call has every row of every tile.
__device__ __forceinline__ bool known_whole(const Params& p, const Item& x) {
  if (x.first_row > 0 || x.end_row < p.lists.nq || p.at.T % (ROWS * row_step(p)) || (!row_steps(p) && x.start % ROWS)) return false;
  bool found = false;
  for (int r = 0; r < (p.lists.list_h ? p.group : 1); r++) found |= p.whole[(i64)x.list(p, r) * p.lists.nk + x.block];
  return found;
}

// ----------------------------------------------------------------------------------------------------------- dK, dV and dS
// Keys of each item and dS of each step, as they stand in shared memory.
__device__ __forceinline__ void store_slopes(const Params& p, const Shared& m) {
  u32 patience = PATIENCE, n = 0, turn = 0, items = 0;
  for (;;) {
    const Plan x = next_plan(m, n, patience);
    if (x.state & STOP || !patience) break;
    if (x.state & EMPTY) continue;
    if (x.state & FIRST) {
      bar_wait(m.full_keys(), items & 1, patience);
      bulk_store(p.keys + ((i64)(x.head / p.group - p.from_head) * p.piece_blocks + x.block - p.from_block) * KEY_BYTES, m.k, KEY_BYTES);
    }
    unsigned char* to = p.slopes + ((i64)(x.head - p.from_head * p.group) * p.most + x.rank) * BLOCK_BYTES;
    for (int s = 0; s < 2; s++) {
      bar_wait(m.full_ds(s), turn, patience);
      for (int w = 0; w < 2; w++)
        if (x.state >> (SEEN + 2 * s + w) & 1) bulk_store(to + (2 * s + w) * PART, m.ds + (2 * s + w) * PART, PART);
      tma_store_commit();
      tma_store_wait_read();
      bar_arrive(m.free_ds(s));
    }
    if (x.state & FIRST) {
      bar_arrive(m.kept());
      items++;
    }
    turn ^= 1;
  }
  tma_store_wait();
}

// does some logsumexp of stage b's rows lie far from 0?
__device__ __forceinline__ int is_far(const Shared& m, u32 b) { return __shfl_sync(~0u, shared_int(m.rows + b * LINE * 4 + 3 * STEP * 4), 0); }

// Scores less their rows' logsumexp, as products that started from it left them, to probabilities, and these rounded. `rows_at`: this lane's rows of the stage; `seen`: load_mask.
__device__ __forceinline__ void to_probabilities(const Params& p, float (&s)[32], u32 (&pr)[16], u32 rows_at, int far, int4 seen, int kind, int left) {
  float c = p.exponent;
  if (far) {  // the score is rounded as in the forward, so that score - lse is right however large both are
    c = 1.f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float2 lse = shared_pair(rows_at + 2 * STEP * 4 + j * 32);
#pragma unroll
      for (int e = 0; e < 4; e++) s[4 * j + e] = (__fmul_rn(s[4 * j + e], p.scale) - (e & 1 ? lse.y : lse.x)) * LOG2E;
    }
  }
  if (kind >= 0 || left < KEYS) mask(s, seen, kind, left);
#pragma unroll
  for (int j = 0; j < 16; j++) {
    s[2 * j] = ex2(s[2 * j] * c); s[2 * j + 1] = ex2(s[2 * j + 1] * c);
    pr[j] = pack<KIND>(s[2 * j], s[2 * j + 1]);
  }
}

template <int N> __device__ __forceinline__ void clear(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) d[i] = 0.f;
}

// Of a part: sums of two rows of a lane, of which row 8 h stands in float32 at wide + at[h], or is none where at[h] is negative. Columns stand as lanes hold them: 16 bytes are columns
// 16 j + 2 (lane % 4), the next, and both 8 further on, d[8 j + 2 h ..].
// A part starts from what the parts before it left, in the unit of its own products: asked for before the item's tiles have come, the loads cost no time.
template <int N> __device__ __forceinline__ void start_part(float (&d)[N], float unit, const float* wide, const i64 (&at)[2]) {
#pragma unroll
  for (int j = 0; j < N / 4; j++) {
    float* x = d + j / 2 * 8 + j % 2 * 2;
    const float4 y = at[j & 1] >= 0 ? *(const float4*)(wide + at[j & 1] + j / 2 * 16) : make_float4(0.f, 0.f, 0.f, 0.f);
    x[0] = y.x * unit; x[1] = y.y * unit; x[4] = y.z * unit; x[5] = y.w * unit;
  }
}
template <int N> __device__ __forceinline__ void leave_part(const float (&d)[N], float scale, float* wide, const i64 (&at)[2]) {
#pragma unroll
  for (int j = 0; j < N / 4; j++) {
    const float* x = d + j / 2 * 8 + j % 2 * 2;
    if (at[j & 1] >= 0) *(float4*)(wide + at[j & 1] + j / 2 * 16) = make_float4(x[0] * scale, x[1] * scale, x[4] * scale, x[5] * scale);
  }
}

// where key c of a block stands, or -1
__device__ __forceinline__ int key_at(const Params& p, int block, int c) {
  return c < existing_keys(p, block, p.at.S) ? first_key(p, block) + (PARTED ? c / p.key_run * p.key_step + c % p.key_run : c) : -1;
}

// where the sums of dK (or of dV) of a section begin
__device__ __forceinline__ i64 section_at(const Params& p, int slot, bool values) {
  return values ? ((i64)p.heads * p.cut * p.sections * WIDTH + (i64)slot * VALUES) * KEYS : (i64)slot * WIDTH * KEYS;
}
// no query of the section sees the block: this group's 64 keys
__device__ __forceinline__ void empty_section(const Params& p, int slot, int w, int tid) {
  float4 *dk = (float4*)(p.sums_of_keys + section_at(p, slot, false)), *dv = (float4*)(p.sums_of_keys + section_at(p, slot, true));
  for (int i = tid; i < 16 * WIDTH; i += 128) dk[16 * w * WIDTH + i] = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int i = tid; i < 16 * VALUES; i += 128) dv[16 * w * VALUES + i] = make_float4(0.f, 0.f, 0.f, 0.f);
}

// Have the parts before this one left sums of dK and dV for the key?
__device__ __forceinline__ bool is_held(const Params& p, int key) { return p.adds & 2 && (!p.held || __ldg(p.held + key / 32) >> key % 32 & 1); }

// Of a part: this group's 64 keys without any query, as the parts before left them.
__device__ __forceinline__ void leave_keys(const Params& p, void* out, float* wide, int width, int padded, int key_head, int block, int w, int tid) {
  const int n = width / 8;
#pragma unroll 1
  for (int i = tid; i < 64 * n; i += 128) {
    const int c = 64 * w + i / n, column = i % n, key = key_at(p, block, c);
    if (key < 0) continue;
    uint4 x = make_uint4(0, 0, 0, 0);
    float2* there = (float2*)wide + ((i64)(key_head - p.from_head) * p.at.S + key) * (padded / 2) + column / 2 * 8 + column % 2;
    if (!p.rounds && !is_held(p, key)) there[0] = there[2] = there[4] = there[6] = make_float2(0.f, 0.f);
    else if (is_held(p, key)) x = make_uint4(pack<KIND>(there[0].x, there[0].y), pack<KIND>(there[2].x, there[2].y), pack<KIND>(there[4].x, there[4].y), pack<KIND>(there[6].x, there[6].y));
    if (p.rounds) ((uint4*)out)[((i64)key_head * p.at.S + key) * n + column] = x;
  }
}

// Two rows of a lane, rounded, to out + at[h], none where that is negative. Lanes exchange in pairs, so that each writes 8 bytes and four of them a sector.
template <int N> __device__ __forceinline__ void write_rounded(const float (&d)[N], float scale, void* out, int width, const i64 (&at)[2]) {
  const int lane = thread_again() & 3, odd = lane & 1;
#pragma unroll
  for (int j = 0; j < N / 4; j += 2)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float* x = d + 4 * j + 2 * h;
      const u32 a = pack<KIND>(x[0] * scale, x[1] * scale), b = pack<KIND>(x[4] * scale, x[5] * scale), other = __shfl_xor_sync(~0u, odd ? a : b, 1);
      const int column = 8 * (j + odd) + 2 * (lane & 2);
      if (at[h] >= 0 && column < width) *(uint2*)((char*)out + 2 * (at[h] + column)) = odd ? make_uint2(other, b) : make_uint2(a, other);
    }
}

__device__ __forceinline__ void multiply_items(const Params& p, const Shared& m, int w) {
  const int tid = threadIdx.x % 128, lane = tid & 31, warp = tid / 32;
  u32 patience = PATIENCE;
  float s[32], dp[32], dk[WIDTH / 2], dv[VALUES / 2];
  u32 pr[16], ds[16], turn = 0, items = 0, plan = 0;
  const u64 a_k = descriptor(m.k + w * 64 * 128), a_v = descriptor(m.v + w * 64 * 128);
  const u32 ds_at = m.ds + w * PART + ((lane >> 4) * 8 + (lane & 7)) * 128 + (((warp * 2 + (lane >> 3 & 1)) ^ (lane & 7)) << 4), rows_at = m.rows + (lane & 3) * 8;
  const auto field = [&](int of) { return __shfl_sync(~0u, shared_int(m.plan_at(plan, of)), 0); };
  const auto release = [&] { if (thread_again() % 128 == 0) bar_arrive(m.free_plan(plan)); plan++; };
  const auto places_of_keys = [&](i64 (&at)[2], int width, bool starts) {  // of a part: where this lane's sums stand in float32; of those that it starts from, where there are any
    const int block = field(BLOCK), head = field(KEY_HEAD) - p.from_head;  // all lanes read a field together: here, not where some of them have no key
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int tid = thread_again() % 128, key = starts && p.sections > 1 ? -1 : key_at(p, block, w * 64 + tid / 32 * 16 + tid % 32 / 4 + 8 * h);
      at[h] = key < 0 || (starts && !is_held(p, key)) ? -1 : ((i64)head * p.at.S + key) * width + 4 * (tid & 3);
    }
  };
  const auto write = [&] {
    const int tid = thread_again() % 128;
    i64 k[2], v[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int key = key_at(p, field(BLOCK), w * 64 + tid / 32 * 16 + tid % 32 / 4 + 8 * h);
      const i64 line = (i64)field(KEY_HEAD) * p.at.S + key;
      k[h] = key < 0 ? -1 : line * p.D;
      v[h] = key < 0 ? -1 : line * p.Dv;
    }
    write_rounded(dk, p.scale, p.dk_out, p.D, k);
    write_rounded(dv, 1.f, p.dv_out, p.Dv, v);
  };
  const auto leave_section = [&] {
    const int tid = thread_again() % 128, c = w * 64 + tid / 32 * 16 + tid % 32 / 4, slot = field(KEY_HEAD);
    const i64 k = section_at(p, slot, false) + c * WIDTH + 4 * (tid & 3), v = section_at(p, slot, true) + c * VALUES + 4 * (tid & 3);
    const i64 at_k[2] = {k, k + 8 * WIDTH}, at_v[2] = {v, v + 8 * VALUES};
    leave_part(dk, p.scale, p.sums_of_keys, at_k);
    leave_part(dv, 1.f, p.sums_of_keys, at_v);
  };
  // A step is 64 queries; b is its stage, and which half of the tile it is.
  const auto begin = [&](u32 b) __attribute__((always_inline)) {
    bar_wait(m.full_q(b), turn, patience);
    start_from(s, rows_at + b * LINE * 4);
  };
  const auto multiply_scores = [&](const u32 b) __attribute__((always_inline)) {
    hold(s);
    wgmma_fence();
    const u64 b_q = descriptor(m.q + b * Q_PARTS * PART);
#pragma unroll
    for (int c = 0; c < WIDTH / 16; c++) wgmma<KIND, K_MAJOR>(s, a_k + c / 4 * (SLAB >> 4) + c % 4 * 2, b_q + c / 4 * (PART >> 4) + c % 4 * 2, 1);
    wgmma_commit();
  };
  const auto multiply_dv = [&](const u32 b) __attribute__((always_inline)) {
    hold(dv);
    wgmma_fence();
    const u64 do_rows = descriptor_columns<PART>(m.dout + b * V_PARTS * PART);
#pragma unroll
    for (int c = 0; c < 4; c++) wgmma<KIND, N_MAJOR>(dv, pr + 4 * c, do_rows + c * 128, 1);
    wgmma_commit();
  };
  const auto step = [&](const u32 stage) __attribute__((always_inline)) {  // its scores are on their way
    const u32 b = uniform(stage);
    const int state = field(STATE), kind = state >> (WHOLE + 2 * b + w) & 1 ? -1 : field(KIND_OF), left = state >> 8 & 255, far = is_far(m, b);
    const int4 seen = load_mask(p.lists, kind, b * STEP);
    wgmma_wait<0>();
    hold(s);
    to_probabilities(p, s, pr, rows_at + b * LINE * 4, far, seen, kind, left);
    if (WIDE) {  // dK and dV are 160 registers a thread: scores and dP leave no room for P in 16 bits beside them
      multiply_dv(b);
      wgmma_wait<0>();
      hold(dv);
    }
    start_from(dp, rows_at + b * LINE * 4 + STEP * 4);
    wgmma_fence();
    const u64 b_do = descriptor(m.dout + b * V_PARTS * PART), q_rows = descriptor_columns<PART>(m.q + b * Q_PARTS * PART);
#pragma unroll
    for (int c = 0; c < VALUES / 16; c++) wgmma<KIND, K_MAJOR>(dp, a_v + c / 4 * (SLAB >> 4) + c % 4 * 2, b_do + c / 4 * (PART >> 4) + c % 4 * 2, 1);
    wgmma_commit();
    if (!WIDE) multiply_dv(b);
    if (WIDE) wgmma_wait<0>(); else wgmma_wait<1>();
    hold(dp);
#pragma unroll
    for (int j = 0; j < 16; j++) ds[j] = pack<KIND>(s[2 * j] * dp[2 * j], s[2 * j + 1] * dp[2 * j + 1]);
    bar_wait(m.free_ds(b), turn ^ 1, patience);
#pragma unroll
    for (int g = 0; g < 4; g++) stmatrix_transposed_at(ds_at + b * 2 * PART + g * 2048, ds[4 * g], ds[4 * g + 1], ds[4 * g + 2], ds[4 * g + 3]);  // as [query][key]
    hold(dk);
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < 4; c++) wgmma<KIND, N_MAJOR>(dk, ds + 4 * c, q_rows + c * 128, 1);
    wgmma_commit();
    shared_to_copy_engine();
    __syncwarp();
    if (thread_again() % 32 == 0) bar_arrive(m.full_ds(b));
    return state;  // not to be read again: the group's first warp may have given the plan back
  };
  const auto free_step = [&](const u32 b) __attribute__((always_inline)) {
    wgmma_wait<0>();
    hold(dk); hold(dv);
    if (thread_again() % 128 == 0) bar_arrive(m.free_q(b));
  };
  // From step b on over those of which no row sees this group's keys; false: the item has no more. No product is under way.
  const auto pass_over = [&](u32& b) __attribute__((always_inline)) {
    for (int state; !WIDE && !((state = field(STATE)) >> (SEEN + 2 * b + w) & 1); b = uniform(b ^ 1)) {
      bar_wait(m.full_q(b), turn, patience);
      bar_wait(m.free_ds(b), turn ^ 1, patience);
      named_sync(4 + w, 128);  // no product keeps the warps together: the stage must not be filled again before all have seen it full
      if (thread_again() % 128 == 0) bar_arrive(m.free_q(b));
      if (thread_again() % 32 == 0) bar_arrive(m.full_ds(b));
      if (b && state & LAST) return false;
      if (b) {
        release();
        turn ^= 1;
        bar_wait(m.full_plan(plan), plan / PLANS & 1, patience);
      }
    }
    return true;
  };
  for (;;) {
    bar_wait(m.full_plan(plan), plan / PLANS & 1, patience);
    const int state = field(STATE);
    if (state & STOP) break;
    if (state & EMPTY) {
      if (state & SECTION) {
        empty_section(p, field(KEY_HEAD), w, thread_again() % 128);
      } else if (PARTED) {
        leave_keys(p, p.dk_out, p.wide_dk, p.D, WIDTH, field(KEY_HEAD), field(BLOCK), w, thread_again() % 128);
        leave_keys(p, p.dv_out, p.wide_dv, p.Dv, VALUES, field(KEY_HEAD), field(BLOCK), w, thread_again() % 128);
      } else {
        store_nothing(p, field(KEY_HEAD), field(BLOCK) * KEYS + 64 * w, thread_again() % 128);
      }
      named_sync(4 + w, 128);
      release();
      continue;
    }
    if (PARTED) {
      i64 at[2];
      places_of_keys(at, WIDTH, true);
      start_part(dk, 1.f / p.scale, p.wide_dk, at);
      places_of_keys(at, VALUES, true);
      start_part(dv, 1.f, p.wide_dv, at);
    } else {
      clear(dk); clear(dv);
    }
    bar_wait(m.full_keys(), items & 1, patience);
    u32 b = 0;
    bool more = pass_over(b);
    if (more) begin(b);
    while (more) {
      multiply_scores(b);
      if (!b) bar_wait(m.full_plan(plan), plan / PLANS & 1, patience);
      const int state = step(b);
      if (b && state & LAST) {
        free_step(b);
        break;
      }
      const bool follows = WIDE || state >> (b ? COMING : SEEN + 2) >> w & 1;
      if (b) { release(); turn ^= 1; }
      b = uniform(b ^ 1);
      begin(b);
      free_step(b ^ 1);
      if (follows) continue;
      if (!b) bar_wait(m.full_plan(plan), plan / PLANS & 1, patience);
      more = pass_over(b);
      if (more) begin(b);
    }
    turn ^= 1;
    bar_wait(m.kept(), items & 1, patience);
    if (thread_again() % 128 == 0) bar_arrive(m.free_keys());
    items++;
    if (field(STATE) & SECTION) {
      leave_section();
    } else if (PARTED && !p.rounds) {
      i64 at[2];
      places_of_keys(at, WIDTH, false);
      leave_part(dk, p.scale, p.wide_dk, at);
      places_of_keys(at, VALUES, false);
      leave_part(dv, 1.f, p.wide_dv, at);
    } else {
      write();
    }
    named_sync(4 + w, 128);
    release();
  }
}

extern "C" __global__ void __launch_bounds__(384, 1) backward(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  const Shared m(raw);
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; s++) { bar_init(m.full_q(s), 1); bar_init(m.free_q(s), 2); bar_init(m.full_ds(s), 8); bar_init(m.free_ds(s), 1); }
    for (int s = 0; s < PLANS; s++) { bar_init(m.full_plan(s), 1); bar_init(m.free_plan(s), READERS); }
    bar_init(m.full_keys(), 1); bar_init(m.free_keys(), 2); bar_init(m.landed(), 1); bar_init(m.kept(), 1);
    bar_fence();
  }
  __syncthreads();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (group == 0) {
    fewer_registers<24>();
    const int warp = threadIdx.x / 32;
    if (warp == 3) plan_items(p, m);
    else if (threadIdx.x == 0) load_items(p, m);
    else if (threadIdx.x == 32) store_slopes(p, m);
  } else {
    more_registers<240>();
    multiply_items(p, m, group - 1);
  }
}

// ---------------------------------------------------------------------------------------------------------------------- dQ
struct Rows { int head, tile, t, n; };  // a query tile: t is the query of its row 0; n: stages; -1: no more items

struct Ring {  // what `queries` holds in shared memory
  u32 base, stages, out, bars;
  unsigned char* raw;
  __device__ __forceinline__ explicit Ring(unsigned char* raw) : base(shared_address(raw)), raw(raw) {
    stages = __shfl_sync(~0u, (base + 1023) & ~1023u, 0);
    out = stages + STAGES * STAGE; bars = out + ROWS * PITCH * 4;
  }
  __device__ __forceinline__ u32 full(int s) const { return bars + 8 * s; }
  __device__ __forceinline__ u32 free(int s) const { return bars + 8 * (STAGES + s); }
  __device__ __forceinline__ u32 full_item(int s) const { return bars + 8 * (2 * STAGES + s); }
  __device__ __forceinline__ u32 free_item(int s) const { return bars + 8 * (2 * STAGES + ITEMS + s); }
  template <class T> __device__ __forceinline__ T* at(u32 address) const { return (T*)(raw + (address - base)); }
  __device__ __forceinline__ Rows* item(int s) const { return at<Rows>(bars + 8 * (2 * STAGES + 2 * ITEMS)) + s; }
  __device__ __forceinline__ u32 seen(int s) const { return bars + 8 * (2 * STAGES + 2 * ITEMS) + ITEMS * sizeof(Rows) + 4 * s; }  // bit w: group w's dS is in the stage
};

// Entries of a row of the lists whose key blocks lie in the piece and begin before the last key: first .. first + n - 1, `gap` left out behind the `full` full ones
struct Run { int first, n, full, gap; };

__device__ __forceinline__ Run open_run(const Params& p, int list, int i, int limit) {
  const int* o = p.lists.offsets + 2 * ((i64)list * p.lists.nq + i);
  const int from = __ldg(o), middle = __ldg(o + 1), end = __ldg(o + 2), past = imin(p.from_block + p.piece_blocks, PARTED ? p.key_tiles : limit / KEYS + (limit % KEYS != 0));
  const int first = from + count_below(p.lists.cols + from, middle - from, p.from_block), last = from + count_below(p.lists.cols + from, middle - from, past);
  const int second = middle + count_below(p.lists.cols + middle, end - middle, p.from_block), full = imax(last - first, 0);
  return {first, full + imax(middle + count_below(p.lists.cols + middle, end - middle, past) - second, 0), full, second - first - full};
}

// item `number`; its tile has no rows in the call, or nothing to be done in this piece: t stays at T
__device__ __forceinline__ Rows open_rows(const Params& p, int number, Run& run) {
  const int2 turn = turn_of(number, p.heads * p.group, p.lists.nq + p.outside, p.ahead_rows, p.together * p.group);
  const int head = p.from_head * p.group + turn.x, b = head / p.Hq, list = __ldg(p.lists.list_of + b * p.lists.list_b + head % p.Hq * p.lists.list_h);
  const int start = first_position(p.at, b), skipped = floor_div(start, ROWS);
  const bool listed = turn.y < p.lists.nq, first = p.from_block == 0, last = p.from_block + p.piece_blocks >= p.key_tiles;
  const i64 i = listed ? __ldg(p.tiles_of + (i64)list * p.lists.nq + turn.y) : (i64)skipped + turn.y - p.lists.nq - p.lists.first, tile = row_steps(p) ? i : i + p.lists.first - skipped;
  const Rows nothing = {head, 0, p.at.T, 0};
  run = {0, 0, 0, 0};
  if (tile < 0 || tile >= p.tiles || (!listed && ((i >= 0 && i < p.lists.nq) || !last))) return nothing;
  if (listed) run = open_run(p, list, (int)i, key_limit(p.at, b));
  if (run.n == 0 && !first && !last) return nothing;
  return {head, (int)tile, row_steps(p) ? first_query(p, (int)i, start) : (int)((skipped + tile) * ROWS - start), 2 * run.n};
}

__device__ __forceinline__ void load_rows(const Params& p, const Ring& m) {
  u32 patience = PATIENCE, s = 0, turn = 1;
  const int items = p.heads * p.group * (p.lists.nq + p.outside);
  for (u32 i = 0;;) {
    bar_wait(m.free_item(i % ITEMS), i / ITEMS & 1 ^ 1, patience);  // before a ticket is drawn: what one block of threads has drawn, no other can take at the end
    const int number = atomicAdd(p.ticket + 1, 1);
    const bool more = number < items && patience;
    Run run = {0, 0, 0, 0};
    const Rows x = more ? open_rows(p, number, run) : Rows{0, 0, 0, -1};
    if (more && x.t >= p.at.T) continue;
    *m.item(i % ITEMS) = x;
    bar_arrive(m.full_item(i % ITEMS));
    i++;
    if (!more) return;
    const unsigned char* slopes = p.slopes + (i64)(x.head - p.from_head * p.group) * p.most * BLOCK_BYTES;
    const unsigned char* keys = p.keys + ((i64)(x.head / p.group - p.from_head) * p.piece_blocks - p.from_block) * KEY_BYTES;
    const auto find = [&](int e) {  // where dS of an entry stands, and its key block
      const int entry = run.first + e + (e < run.full ? 0 : run.gap);
      return e < run.n ? make_int2(__ldg(p.place + entry), __ldg(p.lists.cols + entry)) : make_int2(0, 0);
    };
    int2 next = find(0);
    for (int e = 0; e < run.n; e++) {
      const unsigned char *ds = slopes + (i64)(next.x >> 4) * BLOCK_BYTES, *k = keys + (i64)next.y * KEY_BYTES;
      const int quarters = next.x & 15;
      next = find(e + 1);
      for (int h = 0; h < 2; h++) {
        const int seen = (quarters >> h & 1) | (quarters >> (1 + h) & 2);
        bar_wait(m.free(s), turn, patience);
        *m.at<int>(m.seen(s)) = seen;
        if (seen) bar_expect(m.full(s), STAGE - (seen < 3 ? PART : 0)); else bar_arrive(m.full(s));
        for (int g = 0; g < 2; g++)
          if (seen >> g & 1) bulk_load_once(m.stages + s * STAGE + g * PART, ds + (2 * g + h) * PART, PART, m.full(s));
        for (int c = 0; c < Q_PARTS && seen; c++) bulk_load(m.stages + s * STAGE + (2 + c) * PART, k + (2 * c + h) * PART, PART, m.full(s));
        advance<STAGES>(s, turn);
      }
    }
  }
}

// this group's 64 rows of dQ, rounded: those that the call has
__device__ __forceinline__ void write_rows(const Params& p, const Ring& m, const Rows& x, const float (&dq)[WIDTH / 2], int w, int tid) {
  u32* out = m.at<u32>(m.out) + w * STEP * PITCH;
  const int row = tid / 32 * 16 + tid % 32 / 4, n = p.D / 8;
#pragma unroll
  for (int j = 0; j < WIDTH / 8; j++) {
    out[row * PITCH + 4 * j + tid % 4] = pack<KIND>(dq[4 * j] * p.scale, dq[4 * j + 1] * p.scale);
    out[(row + 8) * PITCH + 4 * j + tid % 4] = pack<KIND>(dq[4 * j + 2] * p.scale, dq[4 * j + 3] * p.scale);
  }
  named_sync(4 + w, 128);
#pragma unroll 1
  for (int k = tid; k < STEP * n; k += 128) {
    const int r = k / n, t = x.t + (w * STEP + r) * row_step(p);
    if (t >= 0 && t < p.at.T) ((uint4*)p.dq)[((i64)x.head * p.at.T + t) * n + k % n] = *(const uint4*)(out + r * PITCH + k % n * 4);
  }
  named_sync(4 + w, 128);
}

__device__ __forceinline__ void multiply_rows(const Params& p, const Ring& m, int w) {
  u32 patience = PATIENCE, s = 0, turn = 0;
  float dq[WIDTH / 2];
  const bool first = p.from_block == 0, last = p.from_block + p.piece_blocks >= p.key_tiles;
  const int tid = threadIdx.x % 128;
  for (u32 i = 0;; i++) {
    bar_wait(m.full_item(i % ITEMS), i / ITEMS & 1, patience);
    const Rows x = *m.item(i % ITEMS);
    const int n = uniform(x.n);
    named_sync(4 + w, 128);
    if (tid == 0) bar_arrive(m.free_item(i % ITEMS));
    if (n < 0) return;
    float4* sums = (float4*)p.sums + (((i64)(x.head - p.from_head * p.group) * p.tiles + x.tile) * 2 + w) * (WIDTH * 16) + tid;
    const auto places_of_rows = [&](i64 (&at)[2]) {  // of a part: where this lane's sums stand in float32
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int t = x.t + (w * STEP + tid / 32 * 16 + tid % 32 / 4 + 8 * h) * row_step(p);
        at[h] = t < 0 || t >= p.at.T ? -1 : ((i64)(x.head - p.from_head * p.group) * p.at.T + t) * WIDTH + 4 * (tid & 3);
      }
    };
    i64 at[2];
    if (PARTED) {
      places_of_rows(at);
      if (!(p.adds & 1)) at[0] = at[1] = -1;
      start_part(dq, 1.f / p.scale, p.wide_dq, at);
    } else {
#pragma unroll
      for (int j = 0; j < WIDTH / 8; j++) {
        const float4 y = first ? make_float4(0.f, 0.f, 0.f, 0.f) : sums[j * 128];
        dq[4 * j] = y.x; dq[4 * j + 1] = y.y; dq[4 * j + 2] = y.z; dq[4 * j + 3] = y.w;
      }
    }
    hold(dq);
    for (int e = 0; e < n; e++) {
      bar_wait(m.full(s), turn, patience);
      const u64 a = descriptor(m.stages + s * STAGE + w * PART), b = descriptor_columns<PART>(m.stages + s * STAGE + 2 * PART);
      if (uniform(shared_int(m.seen(s))) >> w & 1) {
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < 4; c++) wgmma<KIND, N_MAJOR>(dq, a + c * 2, b + c * 128, 1);
      } else {
        named_sync(4 + w, 128);  // no product keeps the warps together: the stage must not be filled again before all have seen it full
      }
      wgmma_commit();
      if (e) {
        wgmma_wait<1>();
        if (thread_again() % 128 == 0) bar_arrive(m.free((s + STAGES - 1) % STAGES));
      }
      advance<STAGES>(s, turn);
    }
    wgmma_wait<0>();
    hold(dq);
    if (n && thread_again() % 128 == 0) bar_arrive(m.free((s + STAGES - 1) % STAGES));
    if (PARTED && !p.rounds) {
      places_of_rows(at);
      leave_part(dq, p.scale, p.wide_dq, at);
    } else if (last) {
      write_rows(p, m, x, dq, w, tid);
    } else {
#pragma unroll
      for (int j = 0; j < WIDTH / 8; j++) sums[j * 128] = make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(384, 1) queries(const __grid_constant__ Params p) {
  DYNAMIC_SHARED(raw);
  const Ring m(raw);
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) { bar_init(m.full(s), 1); bar_init(m.free(s), 2); }
    for (int s = 0; s < ITEMS; s++) { bar_init(m.full_item(s), 1); bar_init(m.free_item(s), 2); }
    bar_fence();
  }
  __syncthreads();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (group == 0) {
    fewer_registers<56>();
    if (threadIdx.x == 0) load_rows(p, m);
  } else {
    more_registers<224>();
    multiply_rows(p, m, group - 1);
  }
}

// ------------------------------------------------------------------------------------------------------------------ before
// What is seen of a kind of partial blocks: of half of its rows by a warp.
__device__ __forceinline__ void start_kind(const Params& p, int kind) {
  const int half = threadIdx.x / 32, row = half * STEP + threadIdx.x % 32;
  u32 seen[2] = {0, 0}, all[2] = {~0u, ~0u};
  for (int r = 0; r < STEP; r += 32)
    for (int n = 0; n < 4; n++) {
      const u32 word = kind_word<ROWS, KEYS>(p.lists, kind, row + r, 32 * n);
      seen[n / 2] |= word;
      all[n / 2] &= word;
    }
  const int found = __any_sync(~0u, seen[0] != 0) | __any_sync(~0u, seen[1] != 0) << 1 | __all_sync(~0u, all[0] == ~0u) << 2 | __all_sync(~0u, all[1] == ~0u) << 3;
  if (threadIdx.x % 32 == 0) p.quarters[2 * kind + half] = found;
}

// What each row starts from, and what is seen of each kind of partial blocks; tickets start at 0.
extern "C" __global__ void __launch_bounds__(STEP) prepare(const __grid_constant__ Params p) {
  if (blockIdx.x >= p.halves) {
    const int n = blockIdx.x - p.halves;
    start_kind(p, n < p.intervals ? 2 * n : 2 * (n - p.intervals) + 1);
    return;
  }
  start_rows(p);
  if (blockIdx.x == 0)
    for (int n = threadIdx.x; n < 2 * p.pieces; n += STEP) p.ticket[n] = 0;
}

// Sums of dK and dV of sections, first to last, to where the keys stand: of a part in float32, else rounded. A block of threads for eight keys of a block.
extern "C" __global__ void __launch_bounds__(128) join(const __grid_constant__ Params p) {
  const int head = blockIdx.x / 16 / p.cut, rank = blockIdx.x / 16 % p.cut, key_head = p.from_head + head, Hk = p.Hq / p.group;
  const int block = block_of(p, __ldg(p.lists.list_of + key_head / Hk * p.lists.list_b + key_head % Hk * p.group * p.lists.list_h), rank);
  for (int i = threadIdx.x; i < 2 * (WIDTH + VALUES); i += 128) {
    const bool values = i >= 2 * WIDTH;
    const int width = values ? VALUES / 4 : WIDTH / 4, n = values ? i - 2 * WIDTH : i, c = blockIdx.x % 16 * 8 + n / width, key = key_at(p, block, c), l = n % width;
    if (key < 0) continue;
    float4 *wide = (float4*)(values ? p.wide_dv : p.wide_dk) + ((i64)head * p.at.S + key) * width + l, sum = PARTED && is_held(p, key) ? *wide : make_float4(0.f, 0.f, 0.f, 0.f);
    for (int s = 0; s < p.sections; s++) {
      const float4 x = ((const float4*)(p.sums_of_keys + section_at(p, (head * p.cut + rank) * p.sections + s, values)))[(i64)c * width + l];
      sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
    }
    if (PARTED) {
      *wide = sum;
      continue;
    }
    const int of = values ? p.Dv : p.D, column = l / 4 * 16 + l % 4 * 2;
    u32* to = (u32*)(values ? p.dv_out : p.dk_out) + (((i64)key_head * p.at.S + key) * of + column) / 2;
    if (column < of) to[0] = pack<KIND>(sum.x, sum.y);
    if (column + 8 < of) to[4] = pack<KIND>(sum.z, sum.w);
  }
}

// how many of from .. end - 1 are longer than x, or as long and before it; all lanes of a warp together
template <class F> __device__ __forceinline__ int rank(int x, int from, int end, const F& length) {
  const int mine = length(x);
  int before = 0;
  for (int y = from + (threadIdx.x & 31); y < end; y += 32) before += length(y) > mine || (length(y) == mine && y < x);
  for (int n = 16; n; n /= 2) before += __shfl_xor_sync(~0u, before, n);
  return before;
}

// Walks, where dS of each entry stands, and what is taken first. A warp for key block x and query tile x of a list.
extern "C" __global__ void __launch_bounds__(32) arrange(const __grid_constant__ Params p) {
  const int most = imax(p.key_tiles, p.lists.nq), list = blockIdx.x / most, x = blockIdx.x % most, nq = p.lists.nq, nk = p.lists.nk, lane = threadIdx.x;
  const int *by_key = p.by_key_offsets + 2 * (i64)list * nk, *by_row = p.lists.offsets + 2 * (i64)list * nq;
  if (x < nq) {
    const int before = rank(x, 0, nq, [&](int i) { return __ldg(by_row + 2 * i + 2) - __ldg(by_row + 2 * i); });
    if (lane == 0) p.tiles_of[(i64)list * nq + before] = x;
  }
  if (x >= p.key_tiles) return;
  const int from = x / p.piece_blocks * p.piece_blocks;
  const int before = rank(x, from, imin(from + p.piece_blocks, p.key_tiles), [&](int j) { return j < nk ? __ldg(by_key + 2 * j + 2) - __ldg(by_key + 2 * j) : 0; });
  if (lane == 0) p.blocks[(i64)list * p.key_tiles + from + before] = x;
  if (x >= nk) return;
  const int base = __ldg(by_key + 2 * from), middle = __ldg(by_key + 2 * x + 1), end = __ldg(by_key + 2 * x + 2);
  for (int e = __ldg(by_key + 2 * x) + lane; e < end; e += 32) {
    const int i = __ldg(p.by_key_rows + e), full = __ldg(by_row + 2 * i), partial = __ldg(by_row + 2 * i + 1), past = __ldg(by_row + 2 * i + 2);
    const int entry = e < middle ? full + count_below(p.lists.cols + full, partial - full, x) : partial + count_below(p.lists.cols + partial, past - partial, x);
    const int kind = e < middle ? -1 : __ldg(p.by_key_kinds + e), low = kind < 0 ? 15 : p.quarters[2 * kind], high = kind < 0 ? 15 : p.quarters[2 * kind + 1];
    const int seen = WIDE ? 15 : (low & 3) | (high & 3) << 2;
    p.place[entry] = (e - base) << 4 | seen;
    p.walk[e] = make_int4(i, kind, e - base, seen | (low & 12) << 2 | (high & 12) << 4);
  }
  bool whole = false;
  u32 seen = 0;  // keys 32 (lane % 4) .. by every eighth row
  for (int e = __ldg(by_key + 2 * x); e < imin(end, __ldg(by_key + 2 * x) + 16) && !whole; e++) {
    const int kind = e < middle ? -1 : __ldg(p.by_key_kinds + e);
#pragma unroll 4
    for (int y = lane / 4; y < ROWS; y += 8) seen |= kind_word<ROWS, KEYS>(p.lists, kind, y, lane % 4 * 32);
    u32 all = seen;
    for (int n = 4; n < 32; n *= 2) all |= __shfl_xor_sync(~0u, all, n);
    whole = __all_sync(~0u, all == ~0u);
  }
  if (lane == 0) p.whole[(i64)list * nk + x] = whole;
}
