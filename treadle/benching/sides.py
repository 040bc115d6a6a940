"""The sides of a benchmark: which there are, what each needs, and a process for one."""

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
"""What a side's process runs, files beside this one."""


@dataclass(frozen=True)
class Peer:
    """A tool to compare with.

    reads    "onnx", where it reads the model as `treadle export` writes it; "torch", where it is a module of PyTorch;
             "folder" or "gguf", where it reads such a file of the model's own
    package  what pip installs for it
    told     what it is, in a line
    """

    reads: str
    package: str
    told: str


PEERS: Mapping[str, Peer] = {
    "eager": Peer("torch", "torch", "PyTorch, call by call"),
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


def peers_of(names: list[str]) -> list[str]:
    """The names, each once. Raises UsageError for one that is no peer."""
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise UsageError(f"there is no peer {unknown[0]!r}", hint="one of " + ", ".join(PEERS))
    return list(dict.fromkeys(names))


class Side:
    """A process that serves one side."""

    def __init__(self, spec: Mapping[str, Any], python: str = sys.executable, script: str = SERVING) -> None:
        """Start it, and wait until the model is open, or cannot be: `answer` says which. `script` is what it runs.

        Raises UsageError for a Python that cannot be started.
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
                f"{python!r} is no Python that runs: {error.strerror or error}",
                hint=Hint(f"python={sys.executable!r}", f"--python {sys.executable}"),
            ) from error
        self.answer = self._read()

    def run(self, count: int = 1) -> list[float]:
        """The seconds of so many runs. Raises UsageError where the process is gone."""
        return list(self._ask(str(count))["seconds"])

    def peak(self) -> int:
        """The most bytes that it had resident."""
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
