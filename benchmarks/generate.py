"""Generation compared with llama.cpp, CTranslate2 and Hugging Face: tokens per second, prefill, batches of 8.

    treadle fetch smollm2
    python benchmarks/generate.py [--model smollm2|gpt2] [--form f32] [--dtype f32] [--threads 1] [--peers python]

SmolLM2-135M comes from its GGUF file, with the matrices in float32 or in the blocks that `--form` names: q4_1, as the
file is shipped, q4_0 or q8_0, or in blocks that llama.cpp makes from float32: q5_0, q5_1, q6_k and the mixes q2_k,
q3_k_m, q4_k_m and q5_k_m (Hugging Face has a float32 model of its shape, and is left out with blocks). GPT-2 small has
drawn weights in float32, because times do not depend on them. `--dtype bf16` has ours multiply bf16 numbers,
`--quantize int8` rounded ones. Each side runs in a process of its own, and all take turns, so that a busy machine slows
all alike; on one thread CPU time is used, which other processes do not lengthen. A figure is a median over rounds,
compared with the time in the same process of a plain read of the bytes that a token reads at least: the weights, and
the keys and values of 256 tokens. `--peers` names the Python that has llama-cpp-python and ctranslate2 (with
transformers, which it converts from); a missing package is reported.

    decode     a token of one row, after 256 others
    batch      a token of each of 8 rows
    prefill    256 tokens of one row
    first      a prompt of 32 tokens, up to its first token
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

Answer = dict[str, float]
"""Seconds of a side, and of a plain read."""
Found = Mapping[str, Mapping[str, list[Answer]]]
"""Seconds by side and kind, over rounds."""

KINDS = ("decode", "batch", "prefill", "first")
TOKENS, ROWS, PROMPT, STEPS = 256, 8, 32, 8
WRITTEN = ("q4_1", "q4_0", "q8_0")
MADE = ("q5_0", "q5_1", "q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k")
"""Forms that llama.cpp produces."""
SIDES = ("treadle", "llama.cpp", "ctranslate2", "huggingface")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("smollm2", "gpt2"), default="smollm2")
    parser.add_argument("--form", choices=("f32", *WRITTEN, *MADE), default="f32")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--quantize", choices=("int8-weights", "int8", "int4", "int4-int8"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", default=sys.executable)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return serve(options)
    with tempfile.TemporaryDirectory() as place:
        prepare(options.model, options.form, Path(place), options.peers)
        found, missing = compare(options, Path(place))
    report(options, found, missing)
    return 0


# -- the sides, each in a process of its own -------------------------------------------------------------------


def serve(options: argparse.Namespace) -> int:
    """Reply to each kind on standard input with a line: its seconds, and the seconds of reading a token's bytes."""
    model, folder, threads = options.model, Path(options.folder), options.threads
    if threads == 1:
        global clock
        clock = time.process_time
    chosen = {"dtype": options.dtype, "quantize": options.quantize} if options.side == "treadle" else {}
    try:
        kinds = MAKERS[options.side](model, folder, threads, **chosen)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), flush=True)
        return 0
    read = np.full(token_bytes(model, folder) // 4, 0.5, np.float32)  # zeros would be one page
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        kind = line.strip()
        seconds = kinds[kind]() if kind in kinds else None
        started = clock()
        read.sum()
        print(json.dumps({"seconds": seconds, "read": clock() - started}), flush=True)
    return 0


clock = time.perf_counter


def timed(call: Callable[[], Any]) -> float:
    started = clock()
    call()
    return clock() - started


def treadle_side(
    model: str, folder: Path, threads: int, dtype: str | None = None, quantize: str | None = None
) -> dict[str, Callable[[], float]]:
    from treadle.ir.target import Target
    from treadle.stepped import open_stepped

    stepped = open_stepped(
        weights_of(model, folder), backend="tvm", target=Target("cpu", threads), dtype=dtype, quantize=quantize
    )
    session = stepped.session(rows=ROWS + 1, capacity=TOKENS + 512)
    ids = prompt_ids(TOKENS)
    row = session.open()
    session.prefill({row: ids})
    many = [session.open() for _ in range(ROWS)]

    def refill(rows: list[int]) -> None:
        for each in rows:
            if session.length(each) > TOKENS + 480:
                raise SystemExit("too many rounds for the capacity")

    session.prefill(dict.fromkeys(many, ids[:PROMPT]))

    def decode() -> float:
        refill([row])
        return timed(lambda: [session.step({row: 5}) for _ in range(STEPS)]) / STEPS

    def batch() -> float:
        refill(many)
        return timed(lambda: [session.step(dict.fromkeys(many, 5)) for _ in range(STEPS)]) / STEPS

    def filled(count: int) -> float:
        session.close(many[-1])
        many[-1] = session.open()
        return timed(lambda: session.prefill({many[-1]: ids[:count]}))

    return {"decode": decode, "batch": batch, "prefill": lambda: filled(TOKENS), "first": lambda: filled(PROMPT)}


def llama_side(model: str, folder: Path, threads: int) -> dict[str, Callable[[], float]]:
    if model != "smollm2":
        return {}
    from llama_cpp import Llama

    sizes = {"n_ctx": TOKENS + 512, "n_batch": 512, "n_threads": threads, "n_threads_batch": threads}
    llm = Llama(str(folder / GGUF), verbose=False, **sizes)
    ids = prompt_ids(TOKENS)

    def decode() -> float:
        llm.reset()
        llm.eval(ids)
        return timed(lambda: [llm.eval([5]) for _ in range(STEPS)]) / STEPS

    def filled(count: int) -> float:
        llm.reset()
        return timed(lambda: llm.eval(ids[:count]))

    return {"decode": decode, "prefill": lambda: filled(TOKENS), "first": lambda: filled(PROMPT)}


def ctranslate2_side(model: str, folder: Path, threads: int) -> dict[str, Callable[[], float]]:
    if model != "gpt2":
        return {}
    import ctranslate2

    generator = ctranslate2.Generator(
        str(folder / "ctranslate2"), device="cpu", compute_type="float32", intra_threads=threads, inter_threads=1
    )
    words = [f"w{i}" for i in prompt_ids(TOKENS)]

    def grown(prompts: list[list[str]], count: int) -> float:
        options = {"max_length": count, "min_length": count, "sampling_topk": 1, "include_prompt_in_result": False}
        return timed(lambda: generator.generate_batch(prompts, **options))

    def steps(prompts: list[list[str]]) -> float:
        return (grown(prompts, STEPS + 1) - grown(prompts, 1)) / STEPS

    return {
        "decode": lambda: steps([words]),
        "batch": lambda: steps([words[:PROMPT]] * ROWS),
        "prefill": lambda: grown([words], 1),
        "first": lambda: grown([words[:PROMPT]], 1),
    }


def huggingface_side(model: str, folder: Path, threads: int) -> dict[str, Callable[[], float]]:
    if not (folder / "hf").exists():
        return {}
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    llm = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    ids = torch.tensor([prompt_ids(TOKENS)])

    def grown(prompts: torch.Tensor) -> tuple[float, Callable[[], float]]:
        with torch.inference_mode():
            started = clock()
            out = llm(prompts, use_cache=True, logits_to_keep=1)
            seconds = clock() - started

        def steps() -> float:
            with torch.inference_mode():
                cache, five = out.past_key_values, torch.full((len(prompts), 1), 5)
                started = clock()
                for _ in range(STEPS):
                    cache = llm(five, past_key_values=cache, use_cache=True).past_key_values
                return (clock() - started) / STEPS

        return seconds, steps

    return {
        "decode": lambda: grown(ids)[1](),
        "batch": lambda: grown(ids[:, :PROMPT].repeat(ROWS, 1))[1](),
        "prefill": lambda: grown(ids)[0],
        "first": lambda: grown(ids[:, :PROMPT])[0],
    }


MAKERS: Mapping[str, Callable[[str, Path, int], dict[str, Callable[[], float]]]] = {
    "treadle": treadle_side,
    "llama.cpp": llama_side,
    "ctranslate2": ctranslate2_side,
    "huggingface": huggingface_side,
}
GGUF = "model.gguf"


def token_bytes(model: str, folder: Path) -> int:
    """Return the least bytes that a token reads: all weights, and the float32 keys and values of earlier tokens."""
    if model == "smollm2":
        return (folder / GGUF).stat().st_size + TOKENS * 30 * 2 * 192 * 4
    return 124_439_808 * 4 + TOKENS * 12 * 2 * 768 * 4


def prompt_ids(count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(0).integers(10, 1000, count)]


def weights_of(model: str, folder: Path) -> str:
    return str(folder / GGUF) if model == "smollm2" else str(folder / "hf")


# -- the files of each side ------------------------------------------------------------------------------------


def prepare(model: str, form: str, folder: Path, python: str) -> None:
    """Write the model's weights in each side's format."""
    import tokenizers
    import torch
    import transformers
    from tokenizers.models import WordLevel

    if model == "gpt2":
        torch.manual_seed(0)
        config = transformers.GPT2Config()
        transformers.GPT2LMHeadModel(config).eval().save_pretrained(folder / "hf")
        words = {f"w{i}": i for i in range(config.vocab_size)}  # CTranslate2 takes words
        marks = {"unk_token": "w0", "bos_token": "w1", "eos_token": "w2"}
        made = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(WordLevel(words, "w0")), **marks
        )
        made.save_pretrained(folder / "hf")
        return
    from treadle.fetching import fetch_model

    fetched = fetch_model("smollm2")
    source = fetched if fetched.suffix == ".gguf" else next(fetched.glob("*.gguf"))
    if form in MADE:
        write_gguf(source, "f32", folder / "f32.gguf")
        quantize(python, folder / "f32.gguf", form, folder / GGUF)
        (folder / "f32.gguf").unlink()
    else:
        write_gguf(source, form, folder / GGUF)
    if form != "f32":
        return
    config = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).eval().save_pretrained(folder / "hf")  # of its shape, with drawn weights


def write_gguf(source: Path, form: str, to: Path) -> None:
    """Write a GGUF file with every tensor in float32, or with quantized tensors in blocks of this form."""
    import gguf

    read = gguf.GGUFReader(str(source))
    field = read.fields["general.architecture"]
    written = gguf.GGUFWriter(str(to), bytes(field.parts[field.data[0]]).decode())
    for name, each in read.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = each.types[0]
        written.add_key_value(name, each.contents(), kind, sub_type=each.types[-1] if len(each.types) > 1 else None)
    written.add_file_type(gguf.LlamaFileType["ALL_F32" if form == "f32" else f"MOSTLY_{form.upper()}"])
    for tensor in read.tensors:
        held = tensor.tensor_type
        wanted = gguf.GGMLQuantizationType[form.upper() if held.name.startswith("Q") else "F32"]
        data = tensor.data
        if held != wanted:
            data = gguf.quants.dequantize(data, held).astype(np.float32)
            data = data if wanted.name == "F32" else gguf.quants.quantize(data, wanted)
        written.add_tensor(tensor.name, data, raw_dtype=wanted)
    written.write_header_to_file()
    written.write_kv_data_to_file()
    written.write_tensors_to_file()
    written.close()


def quantize(python: str, source: Path, form: str, to: Path) -> None:
    """Quantize as llama.cpp does.

    Its mixes use more bits for important tensors, and other forms if rows are not a multiple of 256.
    """
    code = (
        "import llama_cpp as l, sys; p = l.llama_model_quantize_default_params(); p.nthread = 1; "
        "p.ftype = getattr(l, 'LLAMA_FTYPE_MOSTLY_' + sys.argv[2]); "
        "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[3].encode(), p))"
    )
    subprocess.run([python, "-c", code, str(source), form.upper(), str(to)], check=True, capture_output=True)


def convert_ctranslate2(python: str, folder: Path) -> None:
    code = (
        "import ctranslate2, sys; from ctranslate2.converters import TransformersConverter as C; "
        "C(sys.argv[1]).convert(sys.argv[2], force=True)"
    )
    words = [python, "-c", code, str(folder / "hf"), str(folder / "ctranslate2")]
    subprocess.run(words, check=False, capture_output=True)


# -- the rounds ------------------------------------------------------------------------------------------------


def compare(options: argparse.Namespace, folder: Path) -> tuple[Found, dict[str, str]]:
    """Return seconds of each kind, by side, as a list over rounds; and the reasons for missing sides."""
    if options.model == "gpt2":
        convert_ctranslate2(options.peers, folder)
    running: dict[str, subprocess.Popen[str]] = {}
    missing: dict[str, str] = {}
    for side in options.sides.split(","):
        python = options.peers if side in ("llama.cpp", "ctranslate2") else sys.executable
        process = start(side, python, options, folder)
        assert process.stdout is not None
        said = json.loads(process.stdout.readline() or '{"missing": "it ended at once"}')
        if "missing" in said:
            missing[side] = said["missing"]
        else:
            running[side] = process
    found: dict[str, dict[str, list[Answer]]] = {side: {kind: [] for kind in KINDS} for side in running}
    for round_number in range(options.rounds + 1):
        for kind in KINDS:
            for side, process in running.items():
                answer = ask(process, kind)
                if round_number and answer["seconds"] is not None:  # the first warms up
                    found[side][kind].append(answer)
    for process in running.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    return found, missing


def start(side: str, python: str, options: argparse.Namespace, folder: Path) -> subprocess.Popen[str]:
    words = [python, __file__, "--side", side, "--model", options.model, "--threads", str(options.threads)]
    words += ["--dtype", options.dtype, *(["--quantize", options.quantize] if options.quantize else [])]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    return subprocess.Popen(
        [*words, "--folder", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )


def ask(process: subprocess.Popen[str], kind: str) -> dict[str, float]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{kind}\n")
    process.stdin.flush()
    answer: dict[str, float] = json.loads(process.stdout.readline())
    return answer


# -- the output ------------------------------------------------------------------------------------------------


def rows_of(options: argparse.Namespace, found: Found) -> Iterator[dict[str, Any]]:
    amounts = {"decode": 1, "batch": ROWS, "prefill": TOKENS, "first": PROMPT}
    ours = found.get("treadle", {})
    for kind in KINDS:
        for side, kinds in found.items():
            if not kinds[kind]:
                continue
            seconds = statistics.median(x["seconds"] for x in kinds[kind])
            read = statistics.median(x["read"] for x in kinds[kind])
            paired = [a["seconds"] / b["seconds"] for a, b in zip(kinds[kind], ours.get(kind, []), strict=False)]
            yield {
                "model": options.model,
                "form": options.form,
                "dtype": options.dtype,
                "quantize": options.quantize,
                "threads": options.threads,
                "kind": kind,
                "side": side,
                "milliseconds": seconds * 1e3,
                "tokens_per_second": amounts[kind] / seconds,
                "of_a_plain_read": read / seconds,
                "times_ours": statistics.median(paired) if paired else None,
            }


def report(options: argparse.Namespace, found: Any, missing: Mapping[str, str]) -> None:
    rows = list(rows_of(options, found))
    if options.json:
        print(json.dumps({"rows": rows, "missing": missing}))
        return
    ways = ", ".join([options.model, options.form, *filter(None, [f"ours in {options.dtype}", options.quantize])])
    print(f"{ways}, {options.threads} thread{'s' * (options.threads > 1)}")
    for row in rows:
        ratio = "" if row["times_ours"] is None else f"  {row['times_ours']:5.2f} times ours"
        floor = f"  {row['of_a_plain_read']:4.0%} of a plain read" if row["kind"] in ("decode", "batch") else ""
        print(
            f"  {row['kind']:8} {row['side']:12} {row['milliseconds']:8.1f} ms {row['tokens_per_second']:8.1f} tokens/s"
            f"{ratio}{floor}"
        )
    for side, why in missing.items():
        print(f"  {side} is missing: {why}")


if __name__ == "__main__":
    sys.exit(main())
