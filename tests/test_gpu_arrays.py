"""Arrays of CuPy and JAX in, the same kind out, on the device that they are on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operators import copied, public_calls, tensors_of
from targets import GPU_TARGETS, Target, needs_gpu, over
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).parents[1]

#: public functions that take arrays; buffers for results are tensors
CALLS = [name for name in public_calls() if "_out" not in name]


@over(GPU_TARGETS)
@pytest.mark.parametrize("name", CALLS)
def test_cupy(name: str, target: Target) -> None:
    cupy = pytest.importorskip("cupy")
    call = public_calls()[name]
    if any(tensor.dtype == torch.bfloat16 for tensor in call.tensors()):
        pytest.skip("CuPy has no bfloat16")
    expected = call.copied("cuda")
    result = expected.function(*expected.args, **expected.kwargs, backend=target.backend)
    args, kwargs = tree_map_only(
        torch.Tensor, cupy.from_dlpack, copied((call.args, call.kwargs), "cuda")
    )
    got = call.function(*args, **kwargs, backend=target.backend)
    assert type(got) is type(result) or isinstance(got, cupy.ndarray)
    arrays = [leaf for leaf in tree_leaves(got) if leaf is not None]
    assert all(isinstance(array, cupy.ndarray) for array in arrays)
    assert all(array.device.id == 0 for array in arrays)
    # What the arguments hold afterwards too: the cache operators write in place.
    arrays += [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cupy.ndarray)]
    tensors = [leaf for leaf in tree_leaves(result) if leaf is not None]
    tensors += [
        leaf for leaf in tree_leaves((expected.args, expected.kwargs))
        if isinstance(leaf, torch.Tensor)
    ]  # fmt: skip
    assert len(arrays) == len(tensors)
    for index, (array, tensor) in enumerate(zip(arrays, tensors, strict=True)):
        back = torch.from_dlpack(array)
        assert back.dtype == tensor.dtype, f"{name}, tensor {index}"
        assert back.device == tensor.device, f"{name}, tensor {index}"
        assert torch.equal(back.nan_to_num(7.0), tensor.nan_to_num(7.0)), f"{name}, tensor {index}"


@needs_gpu
def test_cupy_stream() -> None:
    """An array that CuPy is still writing, on a stream of its own."""
    cupy = pytest.importorskip("cupy")
    call = public_calls()["token_confidence"].copied("cuda")
    logits = call.args[0]
    expected = tensors_of(call.function(*call.args, **call.kwargs))
    late = cupy.zeros(tuple(logits.shape), dtype=cupy.float32)
    source = cupy.from_dlpack(logits)
    torch.cuda.synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            torch.cuda._sleep(10_000_000)
        late[...] = source
        # The exporter makes the consumer's stream, PyTorch's current one, wait for its own.
        got = call.function(late, **call.kwargs)
    torch.cuda.synchronize()
    for array, tensor in zip(got, expected, strict=True):
        assert torch.equal(torch.from_dlpack(array), tensor)


JAX_SCRIPT = """
import sys
import jax
import jax.numpy as jnp
import numpy
import torch

import lopa_kernels as lk

backend, wide = sys.argv[1], jax.config.jax_enable_x64
device = jax.devices()[0]
if (device.platform == "cpu") != (backend == "cpu"):
    print(f"JAX runs on {device.platform}")
    sys.exit(77)
logits = numpy.random.default_rng(0).normal(size=(5, 3000)).astype(numpy.float32) * 4
expected = lk.token_confidence(logits, metric="margin", backend="cpu")
got = lk.token_confidence(jnp.asarray(logits), metric="margin", backend=backend)
for array, right in zip(got, expected, strict=True):
    assert isinstance(array, jax.Array), type(array)
    assert array.devices() == {device}, array.devices()
    numpy.testing.assert_allclose(numpy.asarray(array), right, rtol=1e-5)
# Without 64-bit types JAX turns the token ids into int32.
assert got.token.dtype == (jnp.int64 if wide else jnp.int32), got.token.dtype
half = lk.token_confidence(jnp.asarray(logits, dtype=jnp.bfloat16), backend=backend)
assert half.prob.dtype == jnp.float32
if wide:
    config = lk.LopaConfig(mask_id=2999, max_new_tokens=8, block_size=4, branches=3, window=12)
    state = lk.initial_state(torch.tensor([[1, 2, 3]]), config)
    rows = numpy.arange(7, dtype=numpy.int32).reshape(1, 1, 7) % 5
    right = lk.lopa_step(torch.from_numpy(logits), state, config, torch.from_numpy(rows))
    arrays = lk.LopaState(*(jnp.asarray(tensor.numpy()) for tensor in state))
    step = lk.lopa_step(jnp.asarray(logits), arrays, config, jnp.asarray(rows), backend=backend)
    assert type(step) is lk.LopaStep and type(step.state) is lk.LopaState
    for name, array, tensor in zip(lk.LopaState._fields, step.state, right.state, strict=True):
        assert isinstance(array, jax.Array), (name, type(array))
        assert array.dtype == tensor.numpy().dtype, name
        numpy.testing.assert_allclose(
            numpy.asarray(array), tensor.numpy(), rtol=1e-5, err_msg=name
        )
print("right")
"""


@over([Target("cpu", "cpu"), *GPU_TARGETS])
@pytest.mark.big
@pytest.mark.parametrize("wide", ["0", "1"])
def test_jax(wide: str, target: Target) -> None:
    """In a process of its own: JAX takes the device's memory, and its 64-bit types are a switch."""
    pytest.importorskip("jax")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_ENABLE_X64": wide,
    }
    if not target.gpu:
        environment["JAX_PLATFORMS"] = "cpu"
    result = subprocess.run(
        [sys.executable, "-c", JAX_SCRIPT, target.backend],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode == 77:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split()[-1] == "right"
