// Keys behind a page table: key s of batch b is row table[b][s / PAGE] * PAGE + s % PAGE of a pool whose rows stand at one step, or a hole, which does not exist, where that
// is none of the pool's `count` pages. PAGE, known when compiling, is 0 where keys stand in order: then row s is key s, and `Pages`, a base of Params, takes no room in it.
#pragma once
#include "numbers.cuh"
#ifndef PAGE
#define PAGE 0
#endif

#if PAGE
struct Pages {  // packed by operands.py in this order, ahead of the other fields
  const int* table;
  int pages, count;  // of a sequence; of the pool
  __device__ __forceinline__ i64 row(int b, int s) const {  // -1: no such key. s < pages * PAGE
    const int page = s < 0 ? -1 : __ldg(table + (i64)b * pages + s / PAGE);
    return page < 0 || page >= count ? -1 : (i64)page * PAGE + s % PAGE;
  }
  __device__ __forceinline__ i64 place(int b, int s, i64 page_step, i64 step) const {  // the same where pages stand apart: an offset
    const i64 at = row(b, s);
    return at < 0 ? -1 : at / PAGE * page_step + at % PAGE * step;
  }
};
#else
struct Pages {
  template <class I> __device__ __forceinline__ I row(int b, I s) const { return s; }
  __device__ __forceinline__ i64 place(int b, int s, i64 page_step, i64 step) const { return s * step; }
};
#endif
