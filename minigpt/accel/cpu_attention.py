"""Packed attention in bf16 as one kernel, for CPUs with AVX512-BF16: attention.cpp.

A C++ compiler, the one that torch.compile needs, builds it into the cache directory when it is
first asked for, which takes a few seconds. Without one, attention is as everywhere else.

Shape legend:
    T  tokens of the batch, H query heads, K key heads, D width of a head, R rows of the plan
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from minigpt.accel.context import Context
from minigpt.files import atomic_file, cache_dir, is_private, make_private

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("attention.cpp")
FLAGS = ["-std=c++17", "-O3", "-funroll-loops", "-fopenmp", "-shared", "-fPIC", "-w"]
FLAGS += [f"-m{name}" for name in ("avx512f", "avx512bw", "avx512vl", "avx512bf16", "fma")]
DIGEST_BYTES = hashlib.sha256().digest_size


class _Heads(ctypes.Structure):
    """A tensor [T, heads, D] of which each head's numbers lie next to each other."""

    _fields_ = (("data", ctypes.c_void_p), ("token", ctypes.c_long), ("head", ctypes.c_long))

    @classmethod
    def of(cls, x: Tensor) -> _Heads:
        assert _dense(x) is x
        return cls(x.data_ptr(), x.stride(0), x.stride(1))


class _Call(ctypes.Structure):
    """What the forward and the backward pass of the kernel get."""

    _fields_ = (
        *((name, _Heads) for name in ("q", "k", "v")),
        *((name, ctypes.c_void_p) for name in ("lse", "rows")),
        *((name, ctypes.c_long) for name in ("count", "heads", "key_heads", "width")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int),
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available() -> bool:
    """Whether the kernel runs here. It is built if need be; failing to build it only logs."""
    return _library() is not None


def applies(q: Tensor) -> bool:
    """Whether the kernel computes the attention of such queries: bf16 on such a CPU."""
    fits = q.dtype == torch.bfloat16 and q.shape[-1] % 16 == 0
    return fits and q.device.type == "cpu" and available()


def fused_attention(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, scaling: float) -> Tensor:
    """Causal attention inside each row of a plan, by the kernel.

    Args:
        q: [T, H, D] bf16.
        k, v: [T, K, D] with K dividing H.
        spans: of the plan.
        scaling: factor of the logits.

    Returns:
        [T, H, D].
    """
    out: Tensor = _forward(*(_dense(x) for x in (q, k, v)), spans, scaling)[0]
    return out


# As operators, compiled layers hold the kernel instead of being broken apart by it. The compiler
# keeps graphs on disk by the names of their operators, so each version has names of its own.
NAME = f"minigpt::attention_{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]}"


@torch.library.custom_op(NAME, mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    call = _call([q, k, v, lse, spans], scaling)
    _loaded().forward(ctypes.byref(call), ctypes.byref(_Heads.of(out)))
    return out, lse


@torch.library.custom_op(f"{NAME}_backward", mutates_args=(), device_types="cpu")
def _backward(grad: Tensor, saved: list[Tensor], scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    grad = _dense(grad)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in saved[:3])
    heads = [ctypes.byref(_Heads.of(x)) for x in (grad, grad_q, grad_k, grad_v)]
    _loaded().backward(ctypes.byref(_call(saved, scaling)), *heads)
    return grad_q, grad_k, grad_v


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@_backward.register_fake
def _(grad: Tensor, saved: list[Tensor], scaling: float) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in saved[:3])


class _Context(Context, Protocol):
    scaling: float


def _save(
    ctx: _Context,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, float],
    output: tuple[Tensor, Tensor],
) -> None:
    q, k, v, spans, ctx.scaling = inputs
    ctx.save_for_backward(q, k, v, output[1], spans)


def _gradients(ctx: _Context, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad, list(ctx.saved_tensors), ctx.scaling), None, None


_forward.register_autograd(_gradients, setup_context=_save)


def _dense(x: Tensor) -> Tensor:
    """Return a tensor whose heads' numbers lie next to each other, in pairs."""
    even = x.stride(0) % 2 == x.stride(1) % 2 == 0
    return x if x.stride(2) == 1 and even else x.contiguous()


def _call(inputs: list[Tensor], scaling: float) -> _Call:
    q, k, v, lse, spans = inputs
    heads = (_Heads.of(x) for x in (q, k, v))
    shape = (len(spans) // 4, q.shape[1], k.shape[1], q.shape[2])
    threads = torch.get_num_threads()
    return _Call(*heads, lse.data_ptr(), spans.data_ptr(), *shape, scaling, threads)


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None
    return library


@cache
def _library() -> ctypes.CDLL | None:
    if not torch.cpu._is_avx512_bf16_supported():
        return None
    try:
        return _load(_build())
    except subprocess.CalledProcessError as error:
        reason = f"{error.cmd[0]} failed. {error.stderr.strip()}"
    except OSError as error:
        reason = str(error)
    log.warning("Attention without its kernel, which only costs speed: %.300s", reason)
    return None


def _build() -> Path:
    """Return the compiled kernel, from the cache if it is there, whole, and of this user.

    The file ends with a digest, behind what is loaded.
    """
    command = [os.environ.get("CXX", "g++"), *FLAGS]
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(command).encode()).hexdigest()
    library = cache_dir() / "kernels" / f"attention-{digest[:16]}.so"
    if _is_sound(library):
        return library
    if library.exists():
        log.warning("%s is damaged, or others may write to it: it is built again.", library)
    with atomic_file(library) as partial:
        command += [str(SOURCE), "-o", str(partial)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        with partial.open("r+b") as file:
            file.write(_digest(library, file.read()))
        make_private(partial)
    return library


def _digest(library: Path, code: bytes) -> bytes:
    return hashlib.sha256(library.name.encode() + code).digest()


def _is_sound(library: Path) -> bool:
    """Whether this user built a library, nobody else may write to it, and it is as it was built."""
    if not is_private(library):
        return False
    content = library.read_bytes()
    code, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    return digest == _digest(library, code)


def _load(library: Path) -> ctypes.CDLL:
    """Load a library that has just been checked: the very file, if others can rename it.

    Raises:
        OSError: when it is another's by now, or cannot be loaded.
    """
    handle = os.open(library, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if os.fstat(handle).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "another user has replaced it", str(library))
        return ctypes.CDLL(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)
