"""Images, audio and labelled tables: what is found, what is read, and what is refused in one sentence."""

from __future__ import annotations

import wave
from pathlib import Path

import pytest
import torch
from PIL import Image

from llm_fp4.calibration import draw_files, media_files, read_audio, read_image, read_labelled
from llm_fp4.errors import CalibrationError


def write_wave(path: Path, samples: list[int], rate: int = 16000, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(torch.tensor(samples, dtype=torch.int16).numpy().tobytes())
    return path


def test_a_folder_is_of_images_or_of_audio(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="holds neither images"):
        media_files(tmp_path)
    (tmp_path / "deeper").mkdir()
    Image.new("L", (4, 3), 128).save(tmp_path / "deeper" / "b.png")
    Image.new("RGB", (4, 3)).save(tmp_path / "a.JPG", format="jpeg")
    kind, files = media_files(tmp_path)
    assert (kind, [f.name for f in files]) == ("image", ["a.JPG", "b.png"])
    assert read_image(files[1]).getpixel((0, 0)) == (128, 128, 128)
    write_wave(tmp_path / "c.wav", [0])
    with pytest.raises(CalibrationError, match="keep them in folders of their own"):
        media_files(tmp_path)
    with pytest.raises(CalibrationError, match="not a directory"):
        media_files(tmp_path / "c.wav")


def test_the_same_seed_draws_the_same_files() -> None:
    files = [Path(str(i)) for i in range(20)]
    assert draw_files(files, 5, 0) == draw_files(files, 5, 0) != draw_files(files, 5, 1)
    assert draw_files(files, 99, 0) == files


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(CalibrationError, match=r"a\.png is not a readable image"):
        read_image(tmp_path / "a.png")


def test_waves_are_read_as_mono_floats(tmp_path: Path) -> None:
    stereo = write_wave(tmp_path / "a.wav", [16384, 0, -32768, -32768], channels=2)
    assert read_audio(stereo, 16000).tolist() == [0.25, -1.0]
    with pytest.raises(CalibrationError, match=r"16,000 samples a second, the model takes 8,000.*ffmpeg -ar 8000"):
        read_audio(stereo, 8000)
    with pytest.raises(CalibrationError, match="holds no sound"):
        read_audio(write_wave(tmp_path / "b.wav", []), 16000)
    (tmp_path / "c.wav").write_bytes(stereo.read_bytes()[:20])
    with pytest.raises(CalibrationError, match=r"c\.wav"):
        read_audio(tmp_path / "c.wav", 16000)


def test_tables_with_and_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('sentence1\tsentence2\tlabel\tidx\nHe "left.\tHe went.\t1\t0\n\n', encoding="utf-8")
    row = read_labelled(tmp_path / "a.tsv")[0]
    assert (row.first, row.second, row.label) == ('He "left.', "He went.", "1")
    (tmp_path / "b.csv").write_text('"one, two",0\nthree,1\n', encoding="utf-8")
    assert [(r.first, r.second, r.label) for r in read_labelled(tmp_path / "b.csv")] == [
        ("one, two", None, "0"),
        ("three", None, "1"),
    ]
    assert len(read_labelled(tmp_path / "b.csv", 1)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no rows"), ("a\tb\tc\td\n", "4 columns and no header"), ("x\tlabel\n1\t2\n", "none of them a sentence"),
        ("text\tlabel\nonly\n", "row 1 has 1 columns instead of 2"), (b"\xff\xfe\x00", "not a table of text"),
    ],
)  # fmt: skip
def test_tables_that_are_not_understood(tmp_path: Path, content: str | bytes, message: str) -> None:
    (tmp_path / "a.tsv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CalibrationError, match=message):
        read_labelled(tmp_path / "a.tsv")
