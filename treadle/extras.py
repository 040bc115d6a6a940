"""Optional packages: the extra of Treadle that installs each, and the commands that need it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from treadle.files.installation import pip_install
from treadle.ir.errors import FrontendError


@dataclass(frozen=True)
class OptionalPackage:
    """A package that only some commands need.

    module        the module that is imported
    distribution  the package's name
    extra         the extra of Treadle that installs it
    use           its use, as text
    commands      the commands that need it, or some of whose models need it
    """

    module: str
    distribution: str
    extra: str
    use: str
    commands: tuple[str, ...] = ()

    @property
    def is_installed(self) -> bool:
        """True if the module can be found. It is not imported, but the package that it is in is."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # of the package that it is in
            return False


_ON_TEXT = (
    *("generate", "chat", "describe", "serve", "embed", "classify", "answer", "tag", "fill", "translate", "summarize"),
    *("transcribe", "perplexity", "train"),
)

OPTIONAL_PACKAGES = (
    OptionalPackage("tvm", "apache-tvm", "tvm", "the tvm backend, the fastest on a CPU", ("roofline",)),
    OptionalPackage("torch", "torch", "torch", "the torch backend, GPUs, t.from_torch", ("launch",)),
    OptionalPackage("tokenizers", "tokenizers", "text", "texts", _ON_TEXT),
    OptionalPackage("huggingface_hub", "huggingface_hub", "text", "names of models on the Hugging Face hub"),
    OptionalPackage("jinja2", "jinja2", "chat", "chat templates", ("chat", "describe", "serve")),
    OptionalPackage("PIL", "pillow", "images", "images", ("label", "match", "describe")),
    OptionalPackage("gguf", "gguf", "gguf", "GGUF files, such as the fetched smollm2"),
    OptionalPackage("onnx", "onnx", "onnx", "ONNX files", ("export",)),
    OptionalPackage("starlette", "starlette", "serve", "the HTTP server", ("serve",)),
    OptionalPackage("uvicorn", "uvicorn", "serve", "the HTTP server", ("serve",)),
    OptionalPackage("prometheus_client", "prometheus-client", "serve", "the HTTP server's metrics", ("serve",)),
    OptionalPackage("nvidia.cuda_nvrtc", "nvidia-cuda-nvrtc-cu12", "cuda", "kernels for target cuda: PTX"),
    OptionalPackage("nvidia.cuda_nvcc", "nvidia-cuda-nvcc-cu12", "cuda", "kernels for target cuda: registers, spills"),
    OptionalPackage("pyopencl", "pyopencl", "opencl", "target opencl"),
    OptionalPackage("wgpu", "wgpu", "webgpu", "target webgpu"),
    OptionalPackage("numba", "numba", "memory", "an exact search for small arenas"),
    OptionalPackage("fast_sugiyama", "fast-sugiyama", "report", "fewer crossings in drawings of reports"),
)

EXTRAS = {each.module: each.extra for each in OPTIONAL_PACKAGES}


def need_packages(what: str, *packages: str) -> None:
    """Raise FrontendError if some of these packages are missing. The hint is one command that installs all of them."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        plural = "s" * (len(missing) > 1)
        extras = dict.fromkeys(EXTRAS[name] for name in missing)
        raise FrontendError(f"{what} needs the package{plural} {', '.join(missing)}", hint=pip_install(*extras))
