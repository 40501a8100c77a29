"""A class for a picture or a sound. Files are opened when a batch is made, so that only their names are kept."""

from __future__ import annotations

import base64
import inspect
import io
import math
from typing import Any

import numpy as np
import torch

from ...data.formats import BadRow
from ...data.tables import Table
from ...errors import ConfigError
from .base import CLASSES, Task, class_scores, confusion, logits_of

THUMBNAIL = 96  # points of the report's small pictures: a few kB each


class _OfMedia(Task):
    """Files to classes; a subclass opens a file."""

    head = True
    measures = CLASSES
    best = "macro_f1"
    what = ""
    package = ""

    def names(self, table: Table) -> list[str]:
        return table.names

    def marks(self, table: Table) -> list[str]:
        return list(table.labels or ())

    def ready(self) -> None:
        from importlib.util import find_spec

        if find_spec(self.package) is None:
            raise ConfigError(f"the package {self.package!r} is not installed", where=f"task={self.name}", fix='pip install "veneer[media]"')

    def size(self, file: dict[str, Any]) -> int:
        """Something that grows with the file's cost in memory. Raises: any error of a file that is damaged."""
        raise NotImplementedError

    def batch(self, files: list[dict[str, Any]]) -> dict[str, Any]:
        raise NotImplementedError

    def encode(self, rows: list[dict[str, Any]]) -> list[dict[str, Any] | BadRow]:
        out: list[dict[str, Any] | BadRow] = []
        for row in rows:
            try:
                out.append({"file": row[self.what], "labels": self.labels.index(row["label"]), "length": self.size(row[self.what])})
            except Exception as e:  # the decoders raise many kinds for files that they cannot read
                out.append(BadRow(f"not a readable {self.what}: {str(e).splitlines()[0] if str(e) else type(e).__name__}"))
        return out

    def collator(self) -> Any:
        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            return dict(self.batch([r["file"] for r in rows])) | {"labels": torch.tensor([r["labels"] for r in rows])}

        return collate

    def segments(self, row: dict[str, Any]) -> list[tuple[str, bool]]:
        return [(str(row["file"].get("path") or f"{len(row['file']['bytes']):,} bytes"), False), (f" → {self.labels[row['labels']]}", True)]

    def scores(self, prediction: Any) -> dict[str, float]:
        return class_scores(logits_of(prediction).argmax(-1), prediction.label_ids)

    def answers(self, trainer: Any, run: Any) -> dict[str, Any]:
        return confusion(self, trainer, run)


def _open(file: dict[str, Any]) -> Any:
    return io.BytesIO(file["bytes"]) if file.get("bytes") else file["path"]


class ImageClassification(_OfMedia):
    """Cross-entropy over classes of pictures, read by Pillow and prepared by the model's own image processor."""

    name = "image-classification"
    auto = "AutoModelForImageClassification"
    processor = "AutoImageProcessor"
    processor_options = {"backend": "pil"}  # torchvision is not needed
    formats = ("image",)
    what = "image"
    package = "PIL"
    cuts = ""

    @classmethod
    def load_processor(cls, path: Any) -> Any:
        import transformers

        try:
            return super().load_processor(path)
        except ImportError:  # older versions of transformers 5 want torchvision here, though the classes made for Pillow do not
            name = transformers.BaseImageProcessor.get_image_processor_dict(path)[0].get("image_processor_type", "")
            found = getattr(transformers, name.removesuffix("Fast").removesuffix("Pil") + "Pil", None)
            if found is None:
                raise
            return found.from_pretrained(path)

    def size(self, file: dict[str, Any]) -> int:
        from PIL import Image

        with Image.open(_open(file)) as image:
            image.load()
        return 1  # the processor brings all to one size

    def batch(self, files: list[dict[str, Any]]) -> dict[str, Any]:
        from PIL import Image

        mode = "L" if getattr(self.model.config, "num_channels", 3) == 1 else "RGB"
        pictures = []
        for file in files:
            with Image.open(_open(file)) as image:
                pictures.append(image.convert(mode))
        return self.tools(images=pictures, return_tensors="pt")

    def picture(self, row: dict[str, Any]) -> str | None:
        from PIL import Image

        small = io.BytesIO()
        with Image.open(_open(row["file"])) as image:
            image = image.convert("RGB")
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            image.save(small, "PNG")
        return f"data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}"


class AudioClassification(_OfMedia):
    """Cross-entropy over classes of sounds, read by soundfile, mixed to one channel, brought to the model's sampling rate
    and cut after `max_seconds`."""

    name = "audio-classification"
    auto = "AutoModelForAudioClassification"
    processor = "AutoFeatureExtractor"
    formats = ("audio",)
    what = "audio"
    package = "soundfile"
    cuts = "max_seconds"

    def ready(self) -> None:
        super().ready()
        self.longest = int(self.config.max_seconds * self.tools.sampling_rate)

    def measured(self, length: int) -> str:
        return f"{length / self.tools.sampling_rate:.1f} s"

    def size(self, file: dict[str, Any]) -> int:
        import soundfile

        info = soundfile.info(_open(file))
        if not info.frames:
            raise ValueError("it holds no samples")
        return math.ceil(info.frames * self.tools.sampling_rate / info.samplerate)

    def sound(self, file: dict[str, Any]) -> np.ndarray:
        """(samples,) at the model's rate."""
        import soundfile

        own = self.tools.sampling_rate
        with soundfile.SoundFile(_open(file)) as opened:
            rate = opened.samplerate
            # a tenth of a second more than is kept, so that resampling does not see the cut
            wave = opened.read(math.ceil((self.longest / own + 0.1) * rate), dtype="float32", always_2d=True).mean(1)
        if rate != own:
            from scipy.signal import resample_poly

            common = math.gcd(rate, own)
            wave = resample_poly(wave, own // common, rate // common).astype(np.float32)
        return wave[: self.longest]

    def batch(self, files: list[dict[str, Any]]) -> dict[str, Any]:
        # an extractor that pads to a fixed length by default (Whisper's) needs it; the others pad to the longest
        fixed = inspect.signature(type(self.tools).__call__).parameters["padding"].default
        waves = [self.sound(f) for f in files]
        return self.tools(waves, sampling_rate=self.tools.sampling_rate, padding=fixed or True, return_tensors="pt")
