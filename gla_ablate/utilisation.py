"""Model FLOPs utilisation (MFU; PaLM, arXiv 2204.02311, appendix B): how much of what a GPU can multiply becomes
operations of the model.

    mfu = flops_per_token · tokens/s / (devices · rate)

`flops_per_token` counts the op analytically (`model.counting`), and nothing that is formed twice. The rate is that of a
product of two 8192 × 8192 matrices in the precision of the trial, measured, where the paper takes the data sheet's: at
the power that it gets, an H200 stays 30 % below that. On a GPU that several trials share (`--per-gpu`) it is what is
left to this one as it begins.
"""

from __future__ import annotations

import torch

SIDE = 8192


def matrix_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of random numbers on the current GPU, the median over 0.1 s.

    Takes up to 1 GiB for as long. Zeros would run faster: less power.
    0.2 s pass before that: an H200 that was idle multiplies at 800 TFLOP/s for 0.1 s, and at 690 from then on.
    """
    import triton

    a, b = (torch.randn(SIDE, SIDE, device="cuda").to(dtype) for _ in range(2))
    milliseconds = triton.testing.do_bench(lambda: a @ b, warmup=200, return_mode="median")
    return 2 * SIDE**3 / (1e-3 * milliseconds)


def peak_flops(precision: str, device: torch.device) -> float | None:
    """`matrix_rate` of `device` for a trial in `precision`; leaves nothing behind. None on a CPU, and on a GPU without
    room for it."""
    if device.type != "cuda":
        return None
    try:
        with torch.cuda.device(device), torch.random.fork_rng([device]):
            return matrix_rate(torch.float32 if precision == "32-true" else torch.bfloat16)
    except RuntimeError:  # out of memory, PyTorch's or cuBLAS's: no reason for a trial to fail
        return None
    finally:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
