"""The MLP's Triton kernel without a GPU: `interpret` it, or `assemble` it for an H100.

    TRITON_INTERPRET=1 python tests/mlp_run.py interpret     equal to PyTorch, forward and backward
    python tests/mlp_run.py assemble [FOLDER]                a line of JSON for each direction

FOLDER: of another train_gpt.py, such as a packed one. It needs a PyTorch with Triton, such as the
stand-in's (tests/test_standin.py).
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOURCE = sys.argv[2] if len(sys.argv) > 2 else str(Path(__file__).resolve().parents[1])
sys.path.insert(0, SOURCE)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402

import train_gpt as t  # noqa: E402


class Interpreted:
    """The kernel for Triton's interpreter, which knows constants by annotations only."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        vars(t).update(inspect.getclosurevars(kernel.fn).nonlocals)  # it does not see closures
        kernel.rewrite().__annotations__.update(
            {name: "constexpr" for name in kernel.arg_names if name.isupper()})

    def __getitem__(self, grid: tuple[int]) -> Callable:
        def plain(value: Any) -> Any:
            return value.value if isinstance(value, triton.language.constexpr) else value

        return lambda *args, **options: self.kernel[grid](*map(plain, args), **options)


def mend_interpreter() -> None:
    """It multiplies bf16 by their bits, and truncates where a GPU rounds: do as a GPU does."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast_impl, bf16 = InterpreterBuilder.cast_impl, triton.language.bfloat16

    def fp32(x: Any) -> np.ndarray:
        wide = x.dtype.scalar == bf16
        return (x.data.astype(np.uint32) << 16).view(np.float32) if wide else x.data

    def dot(_: Any, a: Any, b: Any, total: Any, *__: Any) -> Any:
        product = np.matmul(fp32(a), fp32(b)).astype(np.float32)
        return TensorHandle(product + total.data, total.dtype.scalar)

    def cast(builder: Any, x: Any, to: Any) -> Any:
        if x.dtype.scalar != triton.language.float32 or to.scalar != bf16:
            return cast_impl(builder, x, to)
        rounded = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy(), bf16)

    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.cast_impl = InterpreterBuilder.create_fp_trunc = cast
    InterpreterBuilder.create_fp_to_fp_plain = cast


def plain_mlp(x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """What the kernel stands for."""
    return F.leaky_relu(x @ up.T, slope).square() @ down.T


def kernel_mlp(x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
    """By the kernel, as `MLP.forward` calls it."""
    return t.fused_mlp(x.flatten(0, -2), up, down, slope)[0].view_as(x)


def random(*shape: int) -> Tensor:
    """Normal values over the root of the last width."""
    return torch.randn(shape) / shape[-1] ** 0.5


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (B, T, 2 D), or every second of them, as x (B, T, D); contiguous or not."""
    half = x.size(-1) // 2
    return dict(contiguous=x[..., :half].contiguous(), sliced=x[..., :half],
                strided=x[..., ::2])[layout]


def interpret() -> None:
    """Values and gradients over tiles, shapes, slopes and layouts; of a bf16 unit at most few."""
    mend_interpreter()
    kernel = Interpreted(t.mlp_kernel())
    t.mlp_kernel = lambda: kernel
    tiles, cases = ((16, 32, 16), (32, 32, 32), (16, 64, 16)), 0
    shapes = (((8, 8), 32, 96), ((5, 10), 48, 80), ((1, 1), 16, 16), ((37, 1), 16, 48))
    for t.MLP_TILE, (rows, width, hidden), slope, layout in itertools.product(
            tiles, shapes, (0.5, 0.0), ("contiguous", "sliced", "strided")):
        x, dy = (torch.randn(*rows, 2 * width).bfloat16() for _ in "xy")
        masters, results = (random(hidden, width), random(width, hidden)), []
        for mlp in (kernel_mlp, plain_mlp):
            leaves = [value.clone().requires_grad_() for value in (x, *masters)]
            y = mlp(laid_out(leaves[0], layout), *(w.bfloat16() for w in leaves[1:]), slope)
            y.backward(laid_out(dy, layout))
            results.append([y.detach(), *(leaf.grad for leaf in leaves)])
        for got, wanted in zip(*results, strict=True):
            assert got.dtype == wanted.dtype and got.shape == wanted.shape
            gap = (got.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-9)
            assert gap < 6e-3, (t.MLP_TILE, rows, width, hidden, slope, layout, gap)
        weights = [w.bfloat16() for w in masters]
        _, u, act = t.fused_mlp(laid_out(x, layout).flatten(0, -2), *weights, slope)
        assert torch.equal(act, F.leaky_relu(u.float(), slope).square().bfloat16())
        cases += 1
    print(cases, "cases")


def assemble() -> None:
    """Registers, spills, shared memory and matrix instructions of both directions on sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, (rows, cols, depth) = t.mlp_kernel(), t.MLP_TILE
    names = kernel.arg_names
    for up in (True, False):
        blocks = [(rows, depth), (cols, depth) if up else (depth, cols), *2 * [(rows, cols // 2)]]
        types = [f"tensordesc<bf16[{a}, {b}]>" for a, b in blocks] + ["i32"]
        constants = dict(zip(names[5:], (up, 0.5, 512, 1536, *t.MLP_TILE), strict=True))
        source = ASTSource(
            kernel, dict(zip(names, types, strict=False)) | dict.fromkeys(constants, "constexpr"),
            {(names.index(name),): value for name, value in constants.items()},
            {(4,): [["tt.divisibility", 16]]})
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32),
                              options=dict(num_warps=4, num_stages=3))
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True,
                                   check=True).stdout
        registers, stack, local = map(int, re.search(
            r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage).groups())
        print(json.dumps(dict(
            up=up, registers=registers, spilled=stack + local, shared=made.metadata.shared,
            wgmma=made.asm["ptx"].count("wgmma.mma_async"),
            tma=made.asm["ptx"].count("cp.async.bulk.tensor"))))


if __name__ == "__main__":
    dict(interpret=interpret, assemble=assemble)[sys.argv[1]]()
