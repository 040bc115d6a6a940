"""Damaged folders with quantized weights: `python -m tests.fuzz.quantized_folders [COUNT] [SEED] [LAYOUT ...]`.

Changes one to three things in a folder of each layout: bytes, dtypes, shapes and names of tensors, and values of the
settings. Reading its weights must succeed or raise an error of the TreadleError family; anything else is printed, and
the script ends with status 1. COUNT is the number of folders per layout.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tests.quantized_folders import Encoder, Stored, save_tensors, write_folder
from treadle.files.errors import TreadleError
from treadle.program.source import ModelSource

Array = np.ndarray[Any, Any]

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 5, 8, 48, 1 << 40, -(1 << 70), 0.5, float("inf"), "", "4", "gptq", [], {}, [1],
    [[1]], [0, 0], [128, 128], {"": 1}, "re:.*", ["re:("], "re:" + "(a*)*" * 5, "\ud800", [None],
)  # fmt: skip
DTYPES = (np.int8, np.uint8, np.int32, np.int64, np.float16, np.float32, np.float64)


def damaged(rng: np.random.Generator, tensors: Stored) -> str:
    """Change one tensor that belongs to a linear layer, in place. Return a description."""
    names = [
        name for name, each in tensors.items() if "proj" in name and (each if isinstance(each, str) else each.size)
    ]
    if not names:
        return "nothing"
    name = names[int(rng.integers(len(names)))]
    array, kind = tensors[name], int(rng.integers(7))
    if isinstance(array, str):
        at = int(rng.integers(len(array)))
        words = ("", "null", "-1", "[]", "4", '"x"', "{}", "1e99", "\\ud800")
        tensors[name] = array[:at] + words[int(rng.integers(len(words)))] + array[at + int(rng.integers(4)) :]
    elif kind == 0:
        raw = bytearray(np.ascontiguousarray(array).tobytes())
        for _ in range(int(rng.integers(1, 5))):
            raw[int(rng.integers(len(raw)))] = int(rng.integers(256))
        tensors[name] = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)
    elif kind == 1:
        del tensors[name]
    elif kind == 2:
        shapes = [(-1,), (1, -1), (-1, 1), (*array.shape, 1), array.shape[::-1]]
        tensors[name] = array.reshape(shapes[int(rng.integers(len(shapes)))])
    elif kind == 3 and array.ndim:
        tensors[name] = array[: int(rng.integers(len(array)))]
    elif kind == 4:
        with np.errstate(all="ignore"):
            tensors[name] = array.astype(np.float32).astype(DTYPES[int(rng.integers(len(DTYPES)))])
    elif kind == 5:
        tensors[name + (".x", "_scale", "s")[int(rng.integers(3))]] = tensors.pop(name)
    else:
        fill = (np.nan, np.inf, 0, -1, 255)[int(rng.integers(5))]
        with np.errstate(all="ignore"):
            tensors[name] = np.full(array.shape, fill, np.float64).astype(array.dtype)
    return f"{name}, change {kind}"


def altered(rng: np.random.Generator, settings: Any) -> str:
    """Change one value of the settings, in place. Return a description."""
    inside, path = settings, ""
    while True:
        keys = list(inside)
        key = keys[int(rng.integers(len(keys)))]
        path += f".{key}"
        if isinstance(inside[key], dict) and inside[key] and rng.random() < 0.8:
            inside = inside[key]
            continue
        inside[key] = VALUES[int(rng.integers(len(VALUES)))]
        return f"{path} = {inside[key]!r}"


def run(encode: Encoder, settings: dict[str, Any], count: int, seed: int, folder: Path) -> Counter[str]:
    """Read damaged folders of one layout. Return the outcomes, with a traceback for each error of another family."""
    rng, found = np.random.default_rng(seed), Counter[str]()
    kept: Stored = {}
    place, _ = write_folder(folder, encode, settings, change=kept.update)
    written = json.loads((place / "config.json").read_text())
    for _ in range(count):
        tensors, config = dict(kept), json.loads(json.dumps(written))
        done = []
        for _ in range(int(rng.integers(1, 4))):
            if rng.random() < 0.3 and isinstance(config["quantization_config"], dict) and config["quantization_config"]:
                done.append(altered(rng, config["quantization_config"]))
            else:
                done.append(damaged(rng, tensors))
        save_tensors(tensors, place / "model.safetensors")
        (place / "config.json").write_text(json.dumps(config))
        try:
            resolved = ModelSource.open(place).resolve(as_stored="input_activations" in json.dumps(config))
            for name, array in (resolved.weights or {}).items():
                encoding = resolved.graph.parameters[name].type.encoding
                numbers = np.asarray(array) if encoding is None else encoding.decode(np.asarray(array))
                assert np.isfinite(numbers).all() or "nan" in str(numbers.dtype) or "norm" in name, name
            found["read"] += 1
        except TreadleError:
            found["refused"] += 1
        except Exception:
            found[f"{done}\n{traceback.format_exc()}"] += 1
    return found


def main() -> int:
    from tests.test_quantized_folders import LAYOUTS

    count, seed = ([int(word) for word in sys.argv[1:3]] + [1000, 0][len(sys.argv) - 1 :])[:2]
    wrong = 0
    for name, encode, settings, _ in LAYOUTS:
        if sys.argv[3:] and name not in sys.argv[3:]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = run(encode, settings, count, seed, Path(folder))
        bad = [text for text in found if text not in ("read", "refused")]
        print(f"{name}: {found['read']} read, {found['refused']} refused, {len(bad)} other errors", flush=True)
        for text in bad[:3]:
            print(text)
        wrong += len(bad)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
