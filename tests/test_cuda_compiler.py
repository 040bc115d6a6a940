"""NVRTC and ptxas: recorded figures of kernels, the cache of their results, and refusals."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from tests.backend_checks import needs_tvm
from tests.error_texts import raises_freely
from treadle.backends.tvm.kernels.devices import cuda_compiler
from treadle.backends.tvm.kernels.devices.cuda_compiler import (
    Resources,
    architecture_of,
    compile_cuda,
    compile_ptx,
    missing_compiler,
)
from treadle.ir.errors import BackendError

needs_nvrtc = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))

SUM = """
extern "C" __global__ void __launch_bounds__(32) sum(const float* x, const float* y, float* z) {
  __shared__ float held[32];
  held[threadIdx.x] = x[threadIdx.x] * y[threadIdx.x] + z[threadIdx.x];
  __syncthreads();
  z[threadIdx.x] = held[31 - threadIdx.x];
}
"""


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _never(*_: Any) -> Any:
    raise AssertionError("the compiler ran")


@needs_tvm
@needs_nvrtc
def test_no_kernel_takes_more_resources_than_recorded() -> None:
    """One architecture for each program; `python -m tests.fuzz.cuda_resources` compiles all kernels for all of them."""
    from tests.fuzz.cuda_resources import ARCHITECTURES, program_kernels, recorded, resources, rises
    from tests.support.gpu_emulator.programs import PROGRAMS

    figures, lines = recorded(), []
    for number, name in enumerate(PROGRAMS):
        architecture = ARCHITECTURES[number % 3]
        for kernel in program_kernels(name):
            lines.append(rises(kernel, architecture, resources(kernel, architecture), figures))
    assert len(lines) >= 15
    assert not list(filter(None, lines))


def test_a_figure_that_rises_is_found() -> None:
    from tests.fuzz.cuda_resources import name_of, rises
    from treadle.backends.tvm.kernels.softmax import Softmax

    kernel = Softmax(False, "f32")
    figures = {name_of(kernel): {"sm_90": [64, 256, 0]}}
    assert rises(kernel, "sm_90", Resources(63, 256, 0), figures) == ""
    for more in (Resources(65, 256, 0), Resources(64, 272, 0), Resources(1, 0, 4)):
        assert str(more) in rises(kernel, "sm_90", more, figures)
    assert "no figures are recorded" in rises(kernel, "sm_80", Resources(1, 0, 0), figures)


@needs_nvrtc
def test_resources_and_results_of_the_cache(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compile_cuda(SUM, "sm_90")
    assert made.resources.shared == 32 * 4
    assert 0 < made.resources.registers <= 32
    assert made.resources.spilled == 0
    assert made.cubin.startswith(b"\x7fELF")
    assert "fma" not in made.ptx  # the product and the sum are rounded separately
    with monkeypatch.context() as patch:
        patch.setattr(cuda_compiler, "_translate", _never)
        patch.setattr(cuda_compiler, "_assemble", _never)
        assert compile_cuda(SUM, "sm_90") == made
        with pytest.raises(AssertionError):
            compile_ptx(SUM, "sm_80")
    for path in own_cache.rglob("*.ptx"):
        path.write_bytes(path.read_bytes().replace(b"sum", b"som"))  # the hash no longer matches
    assert compile_cuda(SUM, "sm_90") == made


@needs_nvrtc
def test_a_refused_text_is_reported_with_the_compilers_message(own_cache: Path) -> None:
    with raises_freely(BackendError, match=r"NVRTC does not compile a kernel for sm_80\n.*sums.*undefined"):
        compile_cuda(SUM.replace("held[31", "sums[31"), "sm_80")
    assert not list(own_cache.rglob("*.cubin"))


@needs_nvrtc
def test_the_architecture_of_a_gpu() -> None:
    assert architecture_of((9, 0)) == "sm_90"
    assert architecture_of((8, 9)) == "sm_89"
    assert architecture_of((99, 0)).startswith("sm_1")  # a later GPU runs the PTX of the latest architecture
    with pytest.raises(BackendError, match=r"NVRTC compiles no kernels for GPUs of compute capability 3.5"):
        architecture_of((3, 5))


def test_missing_compilers_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(cuda_compiler, "distribution", none)
    cuda_compiler._nvrtc.cache_clear()
    try:
        with pytest.raises(BackendError, match=r"not installed\n.*nvidia-cuda-nvrtc-cu12\n.*pip install .*\[cuda\]"):
            compile_ptx(SUM + "// not in the cache", "sm_90")
    finally:
        cuda_compiler._nvrtc.cache_clear()
    assert "nvidia-cuda-nvrtc-cu12 and nvidia-cuda-nvcc-cu12 cannot be found" in str(missing_compiler())
