"""Random layouts of very uneven rows through the ordered backward, on an idle chip and beside a kernel that occupies 16 multiprocessors: python -m sparsetile.ci.uneven [--count N] [--backend NAME ...]

Additions to dQ wait for their turn: a layout whose rows are far longer than others, or a chip on which fewer blocks of threads run at once than were counted on, must not make them wait for ever. Each
layout's gradients beside the other kernel have the bits of those on the idle chip; a few rows of some layouts are judged in float64 by the numeric policy. What does not end in time is named.
"""
import argparse
import os
import time
from contextlib import contextmanager

import numpy as np

from sparsetile.autotune import numeric, plain
from sparsetile.backends import devices
from sparsetile.backends.cupy.compile import shared_limit
from sparsetile.ops import attention, patterns
from sparsetile.ops.layout import Layout

SHAPES = ((2, 4, 4, 2048, 2048, 128), (4, 8, 2, 3000, 3000, 128), (1, 4, 4, 1500, 5000, 96), (3, 2, 1, 700, 1100, 128))  # B, Hq, Hk, T, S, D; the second has more items than multiprocessors: rounds turn
CONFIGS = dict(cupy=(dict(heads=8), dict(heads=8, sums=2), dict(heads=8, section=8), dict(heads=2, walk="ascending"), dict(heads=1, walk="freest")),
               triton=(dict(heads=8), dict(heads=2, walk="ascending"), dict(heads=32)))  # each layout of a shape takes the next
GROUPED = dict(cupy=(dict(heads=8, walk="abreast"), dict(heads=8, walk="turning", sums=2), dict(heads=1, walk="turning")), triton=(dict(heads=8, walk="abreast"),))  # of groups of heads, too
PATHS = dict(cupy="hopper", triton="gluon_ordered")
BATCH, PATIENCE = 20, 20  # layouts beside one occupying kernel; seconds after which they hang
HELD = r"""
extern "C" __global__ void __launch_bounds__(1024) hold(const volatile int* released, int* begun, long long nanoseconds) {
  extern __shared__ unsigned char room[];  // of a multiprocessor: no other block of threads that asks for any fits beside it
  unsigned long long start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  if (threadIdx.x == 0) { room[0] = 1; atomicAdd(begun, 1); }
  do { __nanosleep(2000); asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)); } while (!*released && now - start < nanoseconds);
}
"""


def uneven(rng, rows: int, columns: int):
    """A mask of blocks [rows, columns]: rows of any length, most of them short, empty rows and columns, and a few that see, or are seen by, nearly everybody."""
    mask = rng.random((rows, columns)) < rng.random((rows, 1)) ** 4
    mask[rng.random(rows) < 0.15], mask[:, rng.random(columns) < 0.1] = False, False
    for _ in range(rng.integers(3)):
        mask[:, rng.integers(columns)], mask[rng.integers(rows)] = rng.random(rows) < 0.9, rng.random(columns) < 0.9
    return mask


def wait(torch, event, what: str) -> None:
    until = time.monotonic() + PATIENCE
    while not event.query():
        if time.monotonic() > until:
            raise TimeoutError(f"{what} had not ended after {PATIENCE} s")
        time.sleep(0.0005)


@contextmanager
def occupied(torch, multiprocessors: int = 16):
    """What stands inside runs beside a kernel of another stream, one block of threads with all shared memory on each of so many multiprocessors; it must still be there at the end."""
    import cupy
    kernel, shared = cupy.RawKernel(HELD, "hold"), shared_limit(devices.device_info(0).arch)
    kernel.max_dynamic_shared_size_bytes = shared
    flags, side, end = torch.empty(2, dtype=torch.int32, device="cuda").fill_(0), torch.cuda.Stream(), torch.cuda.Event()  # fill_: what ends it is loaded before it runs
    torch.cuda.synchronize()
    with cupy.cuda.ExternalStream(side.cuda_stream):
        kernel((multiprocessors,), (1024,), (flags[:1].data_ptr(), flags[1:].data_ptr(), np.int64(2 * PATIENCE * 10 ** 9)), shared_mem=shared)
    end.record(side)
    try:
        until = time.monotonic() + PATIENCE
        while flags[1].item() < multiprocessors:
            assert time.monotonic() < until, "the occupying kernel has not begun"
        yield
        assert not end.query(), "the occupying kernel ended before the work beside it"
    finally:
        flags[:1].fill_(1)
        side.synchronize()


class Case:
    """One layout with its inputs: `gradients()` on the current stream."""

    def __init__(self, torch, seed: int, backend: str):
        self.shape, self.torch, self.backend, rng = SHAPES[seed % len(SHAPES)], torch, backend, np.random.default_rng(seed)
        B, Hq, Hk, T, S, D = self.shape
        self.mask = uneven(rng, -(-T // 128), -(-S // 128))
        if seed // len(SHAPES) % 2:  # lists made on the device know nothing on the host
            rule = Layout.from_block_mask(torch.from_numpy(self.mask).cuda(), T=T, S=S)
        else:
            rule = patterns.Blocks(self.mask, 128, 128)
        generator = torch.Generator("cuda").manual_seed(seed)
        make = lambda H, n: torch.randn(B, H, n, D, generator=generator, device="cuda").bfloat16()  # noqa: E731
        self.inputs = make(Hq, T), make(Hk, S), make(Hk, S), make(Hq, T)
        self.call = attention.check(*self.inputs[:3], rule, None, None, None, None, 0, None, True, backend, None)
        self.out, self.lse = attention.forward(self.call, True)
        self.config = None  # no path of other chips waits
        if torch.cuda.get_device_capability() == (9, 0):
            configs = CONFIGS[backend] + GROUPED[backend] * (Hq > Hk)
            self.config = dict(path=PATHS[backend], block_q=128, block_k=128, **configs[(seed // len(SHAPES) + seed // 32) % len(configs)])

    def gradients(self):
        return attention.backward(self.call, self.out, self.lse, self.inputs[3], None, self.config)[:3]

    def judge(self, gradients, few: int = 24) -> None:
        """Of the last head: dq of some queries, the first and the last among them, and dk and dv of some keys where no other head adds to them."""
        B, Hq, Hk, T, S, D = self.shape
        q, k, v, dout = (numeric.to_numpy(x[-1:, -1:]) for x in self.inputs)
        dq, dk, dv = (numeric.to_numpy(x[-1:, -1:]) for x in gradients)
        rows, keys = (np.unique(np.linspace(0, n - 1, few).astype(int)) for n in (T, S))
        count = np.repeat(np.repeat(self.mask, 128, 0), 128, 1)[:T, :S].astype(np.int64)

        def both(queries):
            given = q[:, :, queries], k, v, count[queries], dout[:, :, queries]
            wide = (x.astype(np.float64) if n != 3 else x for n, x in enumerate(given))
            return (plain.attention_gradients(*x, scale=D ** -0.5) for x in (wide, given))
        truth, formula = both(rows)
        numeric.assert_close("dq", dq[:, :, rows], truth[0], formula[0], reduction=S + 2 * D)
        if Hq == Hk:
            truth, formula = both(np.arange(T))
            for name, got, true, one, reduction in (("dk", dk, truth[1], formula[1], T + 2 * D), ("dv", dv, truth[2], formula[2], T + D)):
                numeric.assert_close(name, *(x[:, :, keys] for x in (got, true, one)), reduction=reduction)


def run(torch, backend: str, seeds, judged: int) -> None:
    """In batches: on the idle chip, then beside the other kernel. One layout in `judged` is judged in float64."""
    seeds = list(seeds)
    for first in range(0, len(seeds), BATCH):
        batch = {seed: Case(torch, seed, backend) for seed in seeds[first:first + BATCH]}
        done, idle, beside = torch.cuda.Event(), {}, {}

        def gradients(found, where):
            for seed, case in batch.items():
                found[seed] = case.gradients()
                done.record()
                wait(torch, done, f"{backend}, layout {seed}{where}")
        gradients(idle, "")
        with occupied(torch):
            gradients(beside, " beside another kernel")
        for seed, case in batch.items():
            for name, a, b in zip(("dq", "dk", "dv"), idle[seed], beside[seed]):
                assert bool(a.isfinite().all()) and torch.equal(a, b), f"{backend}, layout {seed}: {name} is not finite everywhere, or has other bits beside another kernel"
            if seed % judged == 0:
                case.judge(idle[seed])


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="sparsetile.ci.uneven", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="layouts for each backend")
    parser.add_argument("--backend", nargs="+", default=["cupy", "triton"])
    given = parser.parse_args(arguments)
    import torch
    for backend in given.backend:
        start = time.monotonic()
        try:
            run(torch, backend, range(given.count), judged=97)
        except TimeoutError as error:
            print(error, flush=True)
            os._exit(9)  # a kernel that hangs lets nobody leave in order
        print(f"{backend}: {given.count} layouts of very uneven rows ended with the same bits, idle and beside another kernel; {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
