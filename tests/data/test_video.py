"""Videos through both decoders: PyAV, and torchcodec where the FFmpeg libraries that it needs are installed."""

import sys
from pathlib import Path

import av
import numpy as np
import pytest

from triune.data.readers import images
from triune.data.readers.images import Clip, Decoder, Pyav, Torchcodec, VideoColumn, video_decoder
from triune.errors import UserError

HEIGHT, WIDTH, FPS, FRAMES = 48, 80, 10, 60
CODECS = {"libsvtav1": ("yuv420p", 2), "libx264": ("yuv420p", 30), "libx264rgb": ("rgb24", 30), "mpeg4": ("yuv420p", 12)}
"""Codec -> its pixels, and frames from key frame to key frame."""


@pytest.fixture
def torchcodec() -> type[Decoder]:
    if video_decoder() is not Torchcodec:
        pytest.skip("torchcodec is not installed, or finds no FFmpeg libraries")
    return Torchcodec


@pytest.fixture(params=[Pyav, Torchcodec], ids=["PyAV", "torchcodec"])
def decoder(request: pytest.FixtureRequest) -> type[Decoder]:
    return request.getfixturevalue("torchcodec") if request.param is Torchcodec else request.param


def encode(path: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Moving waves; the mean of a frame tells its number."""
    monkeypatch.setenv("SVT_LOG", "1")
    pixels, key_every = CODECS[codec]
    y, x = np.mgrid[:HEIGHT, :WIDTH] / 10
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options={"g": str(key_every)})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pixels
        for number in range(FRAMES):
            waves = np.stack([np.sin(x + number / 5), np.cos(y - number / 7), np.sin(x + y)], -1)
            image = (30 + 3 * number + 25 * waves).clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("codec", CODECS)
def test_both_give_the_same_pixels(codec: str, torchcodec: type[Decoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any frames in any order through ``VideoColumn``, with two episodes in one file."""
    path = encode(tmp_path / "v.mp4", codec, monkeypatch)
    clips, starts = [Clip(path, 0.0), Clip(path, 2.5)], np.array([0, 25])
    wanted = np.random.default_rng(0).integers(0, FRAMES, 100)
    seen = []
    for kind in (Pyav, torchcodec):
        monkeypatch.setattr(images, "video_decoder", lambda kind=kind: kind)
        column = VideoColumn(clips, starts, FPS)
        assert column.kind == f"video, {kind.__name__}" and column.size(30) == (HEIGHT, WIDTH)
        seen.append(column.read(wanted))
    np.testing.assert_allclose(seen[0].mean((1, 2, 3)), 30 + 3 * wanted, atol=12)
    np.testing.assert_array_equal(*seen)


def test_cut_off(decoder: type[Decoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "v.mp4", "mpeg4", monkeypatch)
    frames = np.empty((4, HEIGHT, WIDTH, 3), np.uint8)
    decoder(path, FPS).read([0.0, 0.1, 1.5, 5.9], frames, range(4))
    np.testing.assert_allclose(frames.mean((1, 2, 3)), [30, 33, 75, 207], atol=12)
    with pytest.raises(UserError, match=r"ends before 6\.000 s"):
        decoder(path, FPS).read([6.0], frames, [0])


def test_damaged(decoder: type[Decoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence, or frames."""
    content = encode(tmp_path / "whole.mp4", "libx264", monkeypatch).read_bytes()
    path, frames = tmp_path / "v.mp4", np.empty((3, HEIGHT, WIDTH, 3), np.uint8)
    generator, said = np.random.default_rng(0), list[str]()
    for cut in (0, 20, len(content) // 2, *generator.integers(0, len(content), 10).tolist()):
        changed = bytearray(content)
        changed[cut : cut + 40] = generator.bytes(40)
        for broken in (content[:cut], bytes(changed)):
            path.write_bytes(broken)
            try:
                decoder(path, FPS).read([0.0, 3.0, 5.0], frames, range(3))
            except UserError as error:
                said.append(str(error))
    assert len(said) > 10 and all("\n" not in sentence and str(path) in sentence for sentence in said)


@pytest.mark.parametrize("fails", ["raise RuntimeError('no FFmpeg')", "raise OSError('no libavutil')", "import no_such_module_at_all"])
def test_without_torchcodec(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchcodec.py").write_text(fails)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    assert video_decoder() is Pyav
