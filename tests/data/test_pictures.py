"""Colours are converted to sRGB, and crops and mirroring vary by epoch."""

import io
import json
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from selfflow.data.datasets import View
from selfflow.data.decoding import Form, read
from selfflow.data.folders import Folder
from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources
from selfflow.method.options import ObjectiveConfig
from selfflow.training.batches import Batches, feature_source
from selfflow.training.checkpoint import migrate
from selfflow.training.config import Config, TrainConfig
from selfflow.training.loop import train
from selfflow.training.run import Run


def image_file(image, kind="PNG", **options):
    written = io.BytesIO()
    image.save(written, format=kind, **options)
    return written.getvalue()


def colour(data, **options):
    "Return the colour of an image of a single colour."
    image = read(data, "image", Form(2, **options))
    assert (image == image[:, :1, :1]).all()
    return image[:, 0, 0].tolist()


def matrix_profile(swapped=False, gamma=2.2, space=b"RGB ", name="made"):
    """Return an ICC profile of version 2 with the primaries of sRGB and a gamma.

    swapped: exchange the primaries of red and green.
    """

    def number(value):
        return struct.pack(">i", round(value * 65_536))

    def xyz(*values):
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = name.encode() + b"\0"
    words = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78)
    red = xyz(0.43607, 0.22249, 0.01392)  # sRGB under D50
    green = xyz(0.38515, 0.71687, 0.09708)
    blue = xyz(0.14307, 0.06061, 0.71410)
    if swapped:
        red, green = green, red
    tags = {b"desc": words, b"wtpt": xyz(0.9642, 1.0, 0.82491)}
    if space == b"RGB ":
        tags |= {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue}
        tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    else:
        tags |= {b"kTRC": curve}
    body = b""
    table = struct.pack(">I", len(tags))
    start = 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += content
    header = struct.pack(">I4sI", start + len(body), b"lcms", 0x02100000)
    header += b"mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    header += number(0.9642) + number(1.0) + number(0.82491)
    return header.ljust(128, b"\0") + table + body


RGB = (200, 100, 50)


def test_a_colour_profile_is_converted_to_srgb():
    exchanged = matrix_profile(swapped=True)
    data = image_file(Image.new("RGB", (4, 4), (220, 30, 40)), icc_profile=exchanged)
    red, green, blue = colour(data)
    assert green > 200
    assert red < 60
    assert blue < 60, "the red of this profile is the green of sRGB"
    assert colour(data, profiles=False) == [220, 30, 40]
    with_alpha = Image.new("RGBA", (4, 4), (220, 30, 40, 128))
    half = colour(image_file(with_alpha, icc_profile=exchanged))
    expected = [round((c * 128 + 255 * 127) / 255) for c in (red, green, blue)]
    assert np.abs(np.subtract(half, expected)).max() <= 1, "blended with white in sRGB"
    palette = Image.new("RGB", (4, 4), (220, 30, 40)).convert("P", palette=1)
    known = palette.convert("RGB").getpixel((0, 0))
    assert colour(image_file(palette, icc_profile=exchanged)) == colour(
        image_file(Image.new("RGB", (4, 4), known), icc_profile=exchanged)
    )


@pytest.mark.parametrize("value", [30, 128, 200])
def test_the_gamma_of_a_profile_is_undone(value):
    linear = (value / 255) ** 1.0
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    profile = matrix_profile(gamma=1.0)
    actual = colour(
        image_file(Image.new("RGB", (4, 4), (value,) * 3), icc_profile=profile)
    )
    assert np.abs(np.subtract(actual, expected)).max() <= 1.5
    grey = matrix_profile(gamma=1.0, space=b"GRAY")
    actual = colour(image_file(Image.new("L", (4, 4), value), icc_profile=grey))
    assert np.abs(np.subtract(actual, expected)).max() <= 1.5
    one_channel = colour(
        image_file(Image.new("L", (4, 4), value), icc_profile=grey), channels=1
    )
    assert abs(one_channel[0] - expected) <= 1.5


@pytest.mark.parametrize(
    "profile",
    [
        b"no profile at all",
        matrix_profile()[:200],
        matrix_profile(gamma=1.0, space=b"GRAY"),
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    ],
    ids=["text", "truncated", "of grey", "sRGB"],
)
def test_a_profile_that_does_not_fit_changes_nothing(profile):
    assert colour(image_file(Image.new("RGB", (4, 4), RGB), icc_profile=profile)) == [
        *RGB
    ]


def test_cmyk_is_converted_without_a_profile():
    for inks, expected in {
        (0, 0, 0, 0): [255, 255, 255],
        (255, 0, 0, 0): [0, 255, 255],
        (0, 0, 0, 255): [0, 0, 0],
        (0, 255, 255, 0): [255, 0, 0],
    }.items():
        image = Image.new("CMYK", (16, 16), inks)
        assert colour(image_file(image, "TIFF")) == expected
        actual = colour(image_file(image, "JPEG", quality=100))
        assert np.abs(np.subtract(actual, expected)).max() <= 3


def png_of_16_bits(pixels, colours):
    "Return a 16-bit PNG, which Pillow cannot write; pixels: (h, w, c) uint16."
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colours, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for name, data in (
        (b"IHDR", header),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):
        file += struct.pack(">I", len(data)) + name + data
        file += struct.pack(">I", zlib.crc32(name + data))
    return file


def test_sixteen_bit_images_of_every_kind_are_read():
    values = np.array([257 * c for c in RGB], np.uint16)
    assert colour(png_of_16_bits(np.tile(values, (4, 4, 1)), 2)) == [*RGB]
    grey = np.full((4, 4, 1), 257 * 77, np.uint16)
    assert colour(png_of_16_bits(grey, 0)) == [77] * 3
    transparent = np.tile(np.array([*values, 0], np.uint16), (4, 4, 1))
    assert colour(png_of_16_bits(transparent, 6)) == [255] * 3
    profile = matrix_profile(gamma=1.0, space=b"GRAY")
    image = Image.fromarray(np.full((4, 4), 257 * 77, np.uint16))
    linear = colour(image_file(image, "PNG", icc_profile=profile))
    assert abs(linear[0] - 255 * (1.055 * (77 / 255) ** (1 / 2.4) - 0.055)) <= 1.5


# crops and mirroring


@pytest.fixture
def stripes(tmp_path):
    "Images of 4 x 40 pixels: red is the column, green the number of the file."
    for i in range(12):
        pixels = np.zeros((4, 40, 3), np.uint8)
        pixels[..., 0] = 6 * np.arange(40)
        pixels[..., 1] = 20 * i
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return tmp_path


def bytes_of(examples):
    return ((examples.signals["image"] + 1) * 127.5).round().int()


def test_random_crops_depend_on_sample_seed_and_epoch(stripes):
    data = Folder(stripes, size=4, shares=(1, 0, 0), spatial_crop="random")
    assert data.varied
    assert not Folder(stripes, size=4).varied
    indices = torch.arange(12)
    plain = bytes_of(data.take(indices))
    assert (plain[:, 0, 0] == torch.tensor([6 * c for c in range(18, 22)])).all()

    def lefts(seed, epoch):
        view = View(seed, torch.full((12,), epoch))
        return bytes_of(data.take(indices, view))[:, 0, 0, 0]

    first = lefts(0, 0)
    assert torch.equal(first, lefts(0, 0)), "an epoch always has the same crops"
    assert len(first.unique()) > 6
    assert first.max() <= 6 * 36
    for others in (lefts(0, 1), lefts(1, 0)):
        assert (others != first).sum() > 8
    everywhere = torch.cat([lefts(0, epoch) for epoch in range(60)]).float()
    assert abs(everywhere.mean() / 6 - 18) < 1.5, "uniform over the image"
    assert not data.decoded.keys() - {(int(i), data.form) for i in indices}


def test_half_of_the_samples_are_mirrored(stripes):
    data = Folder(stripes, size=(4, 40), shares=(1, 0, 0), flip=True)
    plain = bytes_of(data.take(torch.arange(12)))
    mirrored = 0
    for epoch in range(40):
        taken = bytes_of(data.take(torch.arange(12), View(0, torch.full((12,), epoch))))
        for image, original in zip(taken, plain, strict=True):
            is_mirrored = torch.equal(image, original.flip(-1))
            assert is_mirrored or torch.equal(image, original)
            mirrored += is_mirrored
    assert abs(mirrored / 480 - 0.5) < 0.1


def test_batches_vary_by_epoch_and_resume_exactly(stripes):
    data = DataConfig(
        "folder",
        path=str(stripes),
        height=4,
        width=8,
        patch=4,
        flip=True,
        spatial_crop="random",
    )
    config = Config(data=data, training=TrainConfig(batch=5, steps=9, shards=1))
    sources = Sources(data)
    batches = Batches(sources, config)
    expected = list(batches.loader())
    resumed = list(Batches(Sources(data), config).loader(first=4, workers=1))
    for before, after in zip(expected[4:], resumed, strict=True):
        assert torch.equal(before.x0, after.x0)
        assert torch.equal(before.indices, after.indices)
    halves = [replace(batches, rank=rank, processes=2)[3].x0 for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), expected[3].x0), "for two processes as well"
    features = torch.zeros(len(sources.data["folder"]), 4)
    repa = Config(data=data, objective=ObjectiveConfig("repa"))
    with pytest.raises(ValueError, match=r"no data\.flip"):
        feature_source(features, repa, sources, torch.device("cpu"))


def test_a_run_from_before_profiles_continues_without_them(stripes, tmp_path, capsys):
    data = DataConfig("folder", path=str(stripes), height=4, width=8, patch=4)
    training = TrainConfig(batch=4, steps=2, shards=1, sample_every=0)
    config = Config(name="older", data=data, training=training)
    folder = tmp_path / "runs"
    train(replace(config, data=replace(data, profiles=False)), folder, "cpu", bar=False)
    file = folder / "older" / "config.json"
    stored = json.loads(file.read_text())
    settings = stored["config"]["data"]
    del (settings[0] if isinstance(settings, list) else settings)["profiles"]
    file.write_text(json.dumps(stored))
    assert not Run.open(folder / "older").config.shared.profiles
    assert migrate(migrate(stored)) == migrate(stored)
    longer = replace(config, training=replace(training, steps=3))
    assert not train(longer, folder, "cpu", bar=False).config.shared.profiles
