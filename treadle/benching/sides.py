"""The sides of a benchmark: the peers, their requirements, and the processes that run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treadle.ir.errors import Hint, UsageError

SERVING, LIMITS = "serving.py", "limits.py"
"""The scripts that a side's process can run: files next to this one."""


@dataclass(frozen=True)
class Peer:
    """A tool to compare with.

    reads    "onnx" if it reads the output of `treadle export`; "torch" if it runs a module of PyTorch; "folder" or
             "gguf" if it reads the model's own file of this kind
    package  the packages to install with pip
    summary  a line of text that describes it
    """

    reads: str
    package: str
    summary: str


PEERS: Mapping[str, Peer] = {
    "eager": Peer("torch", "torch", "PyTorch, eager mode"),
    "compile": Peer("torch", "torch", "torch.compile with frozen weights"),
    "onnxruntime": Peer("onnx", "onnxruntime", "ONNX Runtime, float32"),
    "onnxruntime-int8": Peer("onnx", "onnxruntime", "ONNX Runtime, its dynamic quantization to int8"),
    "openvino": Peer("onnx", "openvino", "OpenVINO, float32"),
    "openvino-bf16": Peer("onnx", "openvino", "OpenVINO, bf16"),
    "openvino-int8": Peer("onnx", "openvino nncf", "OpenVINO, quantized to int8 by NNCF, static; the rest in bf16"),
    "ctranslate2": Peer("folder", "ctranslate2 transformers torch", "CTranslate2, float32"),
    "ctranslate2-int8": Peer("folder", "ctranslate2 transformers torch", "CTranslate2, its dynamic int8"),
    "llama.cpp": Peer("gguf", "llama-cpp-python", "llama.cpp, on the file's own blocks"),
}


_OTHER_NAMES = {
    **dict.fromkeys(("torch", "pytorch", "transformers", "hf", "huggingface"), "eager, or compile for torch.compile"),
    **dict.fromkeys(("torch.compile", "torchcompile", "inductor"), "compile"),
    **dict.fromkeys(("ort", "onnx", "onnxrt"), "onnxruntime"),
    **dict.fromkeys(("llamacpp", "llama_cpp", "gguf"), "llama.cpp"),
    "ct2": "ctranslate2",
}
"""Peers by other names."""


def peers_of(names: list[str]) -> list[str]:
    """Return the names without repetition. Raises UsageError for an unknown peer."""
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        meant = _OTHER_NAMES.get(unknown[0].lower().replace("-", "").replace(" ", ""))
        hint = f"{meant}; it is one of " if meant else "one of "
        raise UsageError(f"there is no peer {unknown[0]!r}", hint=hint + ", ".join(PEERS))
    return list(dict.fromkeys(names))


class Side:
    """A process that serves one side."""

    def __init__(self, spec: Mapping[str, Any], python: str = sys.executable, script: str = SERVING) -> None:
        """Start the process, and wait until the model is open or has failed: see `answer`. `script` is the file to run.

        Raises UsageError for a Python interpreter that cannot be started.
        """
        threads = str(spec["threads"])
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        try:
            self._process = subprocess.Popen(
                [python, str(Path(__file__).with_name(script)), json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, **dict.fromkeys(names, threads)},
            )
        except OSError as error:
            raise UsageError(
                f"cannot run the Python interpreter {python!r}: {error.strerror or error}",
                hint=Hint(f"python={sys.executable!r}", f"--python {sys.executable}"),
            ) from error
        self.answer = self._read()

    def run(self, count: int = 1) -> list[float]:
        """Return the seconds of `count` runs. Raises UsageError if the process has ended."""
        return list(self._ask(str(count))["seconds"])

    def peak(self) -> int:
        """Return the peak resident memory of the process in bytes."""
        return int(self._ask("")["peak"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._read()
        if "missing" in answer:
            raise UsageError("a side of the benchmark ended while it ran", received=answer["missing"])
        return answer

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            return {"missing": f"its process ended with status {self._process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer
