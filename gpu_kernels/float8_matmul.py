"""Products of 8-bit floats: rows of activations rounded as they come, and the product of both.

    codes, scales = float8_rows(x)                      # e4m3 [M, K] and float32 [M, 1]
    y = float8_matmul(x, weight, weight_scales)         # [M, N], x and weight with a scale a row

The largest number of a row becomes the largest of e4m3. Eager on CUDA one Triton kernel reads a row
once; a compiler fuses the same into what comes before; elsewhere, and in other dtypes than
bfloat16, plain torch multiplies what both sides became. Rows and columns are filled up to what the
tensor cores take.

Shapes: M rows, N outputs, K inputs
"""

import functools

import torch
import torch.nn.functional as F

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max  # 448
LEAST_SCALE = 1e-12  # of a row of zeros
ALIGNED = 16  # rows and columns of a product
MAX_WIDTH = 32768  # of a row that one program holds in registers


def float8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes e4m3 [M, K], scales float32 [M, 1]) of x [M, K]."""
    if x.is_cuda and x.shape[1] <= MAX_WIDTH and not torch.compiler.is_compiling():
        return _round_rows(x)
    values = x.float()
    scales = (values.abs().amax(1, keepdim=True) * (1 / E4M3_MAX)).clamp(min=LEAST_SCALE)
    # the cast alone would make NaN of what rounding pushes beyond 448
    return (values / scales).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scales


@functools.cache
def _kernel():
    """The Triton kernel, built on first use: there is no Triton where there is no GPU."""
    import triton
    import triton.language as tl

    @triton.jit
    def round_rows(
        x, codes, scales, K, MOST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One program a row [K]. NaN or infinity makes NaN of it, in codes or in the scale."""
        row = tl.program_id(0).to(tl.int64)
        k = tl.arange(0, BLOCK)
        a = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(a), axis=0) * (1 / MOST), LEAST)
        a = tl.div_rn(a, scale)
        a = tl.where(a > MOST, MOST, tl.where(a < -MOST, -MOST, a))  # NaN stays NaN
        tl.store(codes + row * K + k, a.to(codes.dtype.element_ty), mask=k < K)
        tl.store(scales + row, scale)

    return round_rows


def _round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, (M, K) = x.contiguous(), x.shape
    codes = torch.empty(M, K, dtype=E4M3, device=x.device)
    scales = torch.empty(M, 1, dtype=torch.float32, device=x.device)
    if M:
        block = 1 << (K - 1).bit_length()
        _kernel()[(M,)](
            x, codes, scales, K, MOST=E4M3_MAX, LEAST=LEAST_SCALE, BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return codes, scales


def padded(codes: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """e4m3 codes filled up with zeros; themselves where there is nothing to fill."""
    pad = (0, columns - codes.shape[1], 0, rows - len(codes))
    return F.pad(codes.view(torch.uint8), pad).view(E4M3) if any(pad) else codes


def aligned(n: int) -> int:
    return -(-n // ALIGNED) * ALIGNED


def float8_matmul(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[M, N] in x's dtype of x [M, k], its rows rounded, and weight e4m3 [N, K], K >= k, both
    multiples of ALIGNED and filled up with zeros, with scales float32 [1, N]."""
    codes, own = float8_rows(x)
    M, K = len(x), weight.shape[1]
    codes = padded(codes, M, K)
    if x.dtype == torch.bfloat16 and x.is_cuda and _has_float8(x.device.index):
        codes, own = padded(codes, aligned(M), K), F.pad(own, (0, 0, 0, aligned(M) - M))
        # sums are kept in float32 throughout, not in the 14 bits of fast ones
        y = torch._scaled_mm(
            codes, weight.t(), own, scales, out_dtype=x.dtype, use_fast_accum=False
        )
        return y[:M]
    return F.linear(codes.float() * own, weight.float() * scales.t()).to(x.dtype)


def _has_float8(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


# torch.compiler.assume_constant_result would import all of dynamo here, seconds of every start
vars(_has_float8)["_dynamo_marked_constant"] = True
