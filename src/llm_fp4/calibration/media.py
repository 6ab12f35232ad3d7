"""Images and audio as calibration data: which files a directory holds, and their content."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_fp4.errors import CalibrationError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
AUDIO = (".wav", ".flac", ".ogg")


def media_files(folder: Path) -> tuple[str, list[Path]]:
    """Return "image" or "audio" and the files of that kind below ``folder``, sorted by path.

    Raises:
        CalibrationError: there is no folder, no such file, or both kinds.
    """
    if not folder.is_dir():
        raise CalibrationError(f"{folder} is not a directory; name one that holds images or audio files")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    images = [p for p in files if p.suffix.lower() in IMAGES]
    audio = [p for p in files if p.suffix.lower() in AUDIO]
    if images and audio:
        raise CalibrationError(
            f"{folder} holds images ({images[0].name}) and audio ({audio[0].name}); keep them in folders of their own"
        )
    if not images and not audio:
        raise CalibrationError(f"{folder} holds neither images ({', '.join(IMAGES)}) nor audio files ({', '.join(AUDIO)})")
    return ("image", images) if images else ("audio", audio)


def draw_files(files: list[Path], count: int, seed: int) -> list[Path]:
    """Return ``count`` of ``files`` drawn with ``seed``, in their order; all of them where there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(len(files), generator=generator)[:count].sort().values
    return [files[i] for i in kept.tolist()]


def read_image(path: Path) -> Any:
    """Return the image in ``path`` as a PIL image in RGB.

    Raises:
        CalibrationError: Pillow is missing, or the file is no whole image.
    """
    try:
        from PIL import Image
    except ImportError:
        raise CalibrationError("reading images needs Pillow; install it: pip install 'llm-fp4[images]'") from None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise CalibrationError(f"{path} is not a readable image ({type(error).__name__}); remove or repair it") from None


def read_audio(path: Path, rate: int) -> Tensor:
    """Return the (samples,) float32 of an audio file, its channels averaged.

    Args:
        rate: samples a second that the model was trained on.
    Raises:
        CalibrationError: not readable, or recorded at another rate.
    """
    samples, found = _wave(path) if path.suffix.lower() == ".wav" else _sound(path)
    if found != rate:
        raise CalibrationError(
            f"{path} has {found:,} samples a second, the model takes {rate:,}; convert it first (ffmpeg -ar {rate})"
        )
    if samples.numel() == 0:
        raise CalibrationError(f"{path} holds no sound; remove it")
    return samples


def _wave(path: Path) -> tuple[Tensor, int]:
    """Read integer PCM of 8, 16 or 32 bits; anything else through soundfile."""
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = bytearray(file.readframes(file.getnframes()))
    except wave.Error:  # float or compressed samples
        return _sound(path)
    except (OSError, EOFError) as error:
        raise CalibrationError(f"{path} is not a readable WAV file ({error or 'it is cut off'}); remove or repair it") from None
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    if width not in kinds:
        return _sound(path)
    whole = len(data) - len(data) % (width * channels)
    if whole == 0:
        return torch.zeros(0), rate
    values = torch.frombuffer(data[:whole], dtype=kinds[width]).float().view(-1, channels).mean(1)
    return (values - 128) / 128 if width == 1 else values / 2.0 ** (8 * width - 1), rate


def _sound(path: Path) -> tuple[Tensor, int]:
    try:
        import soundfile
    except ImportError:
        raise CalibrationError(
            f"reading {path.name} needs soundfile; install it: pip install 'llm-fp4[audio]', or convert to 16-bit WAV"
        ) from None
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise CalibrationError(f"{path} is not a readable audio file ({error}); remove or repair it") from None
    return torch.from_numpy(samples).mean(1), int(rate)
