"""Aspect buckets have sizes of one area, and every batch has one size.

Runs on them train, resume and sample any size.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from selfflow.cli import main
from selfflow.data.autoencoder import Haar
from selfflow.data.buckets import buckets_of, nearest_bucket
from selfflow.data.folders import Folder
from selfflow.data.latents import encode_latents
from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources
from selfflow.method.options import ModelConfig
from selfflow.method.schedule import NoiseLevels
from selfflow.method.tokens import Part
from selfflow.method.transformer import Transformer, TransformerConfig
from selfflow.report.look import look
from selfflow.training.batches import Batches, bucket_of_step
from selfflow.training.config import Config, TrainConfig
from selfflow.training.loop import train
from selfflow.training.run import Run


@given(
    st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 2, 8]), st.floats(1, 8)
)
def test_sizes_are_multiples_of_one_area(rows, columns, multiple, aspect):
    height = rows * multiple
    width = columns * multiple
    sizes = buckets_of(height, width, multiple, aspect)
    assert (height, width) in sizes
    assert len({*sizes}) == len(sizes)
    area = height * width
    for high, wide in sizes:
        assert high % multiple == wide % multiple == 0
        # rounding changes a side by at most half a patch
        assert abs(high * wide - area) <= multiple * max(high, wide)
        if (high, wide) != (height, width):
            assert max(high, wide) <= aspect * min(high, wide)
    for number, (high, wide) in enumerate(sizes):
        near = nearest_bucket((wide, high), sizes)
        assert near is not None
        assert sizes[near][0] * wide == high * sizes[near][1] or near == number


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    st.integers(1, 16),
    st.integers(0, 3),
)
def test_all_samples_are_used_equally_often(counts, batch, seed):
    steps = 300
    batches_of = [0] * len(counts)
    for step in range(steps):
        bucket, ordinal = bucket_of_step(tuple(counts), batch, seed, step)
        assert ordinal == batches_of[bucket], (
            "the batches of a bucket follow one another"
        )
        batches_of[bucket] += 1
    epochs = steps * batch / sum(counts)
    for count, batches in zip(counts, batches_of, strict=True):
        # ahead or behind by at most one cycle and one batch
        assert abs(batches * batch - epochs * count) <= count + len(counts) * batch


@pytest.fixture
def photos(tmp_path):
    "Images of 12 x 8, 8 x 12 and 8 x 8 with a white border, and a panorama."
    folder = tmp_path / "photos"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, (height, width) in enumerate([(8, 12), (12, 8), (8, 8)] * 9):
        pixels = np.full((height, width, 3), 255, np.uint8)
        pixels[1:-1, 1:-1] = 5 * i
        Image.fromarray(pixels).save(folder / f"{i}.png")
    # stored in landscape, shown in portrait
    Image.new("RGB", (12, 8)).save(folder / "27.png", exif=exif)
    Image.new("RGB", (300, 8)).save(folder / "wide.png")
    return folder


def options(photos):
    return DataConfig(
        "folder", path=str(photos), height=8, width=8, patch=2, aspect=2, flip=True
    )


def test_batches_have_one_size_and_resume_exactly(photos):
    data = options(photos)
    assert {(8, 8), (10, 6), (6, 10)} <= {*data.sizes}
    config = Config(data=data, training=TrainConfig(batch=4, steps=14, shards=1))
    sources = Sources(data)
    folder = sources.data["folder"]
    assert folder.skipped["has sides that no bucket fits"] == ["wide.png"]
    batches = list(Batches(sources, config).loader())
    grids = set()
    for batch in batches:
        (part,) = batch.parts
        grids.add(part.grid)
        assert batch.x0.shape == (4, part.tokens, part.channels)
        size = 2 * part.grid[1], 2 * part.grid[2]
        numbers = folder.bucket_numbers[batch.indices]
        assert {folder.buckets[number] for number in numbers.tolist()} == {size}
        images = sources.layout_of("folder", batch.parts).unpatchify(batch.x0)["image"]
        assert images.shape[2:] == size
        alone = Folder(photos, size=size, shares=(1, 0, 0))
        places = {entry.name: place for place, entry in enumerate(alone.entries)}
        names = [folder.entries[index].name for index in batch.indices.tolist()]
        plain = alone.take(torch.tensor([places[name] for name in names]))
        for image, original in zip(images, plain.signals["image"], strict=True):
            assert torch.equal(image, original) or torch.equal(image, original.flip(-1))
    assert len(grids) > 1
    resumed = list(Batches(Sources(data), config).loader(first=5))
    for before, after in zip(batches[5:], resumed, strict=True):
        assert torch.equal(before.x0, after.x0)
        assert before.parts == after.parts


def test_the_bucket_of_a_rotated_photo_is_that_of_the_upright_image(photos):
    data = Folder(photos, size=8, shares=(1, 0, 0), aspect=2, multiple=2)
    by_name = {
        entry.name: data.buckets[number]
        for entry, number in zip(data.entries, data.bucket_numbers, strict=True)
    }
    assert by_name["27.png"] == by_name["1.png"] == (10, 6)
    assert data.take(torch.arange(3)).signals["image"].shape == (3, 3, 8, 8)


def test_buckets_are_not_dropped_without_a_word_when_latents_are_encoded(
    photos, tmp_path
):
    data = Folder(photos, size=8, shares=(1, 0, 0), aspect=2, multiple=2)
    with pytest.raises(ValueError, match="aspect buckets; use data.aspect 1"):
        encode_latents(data, Haar(), tmp_path / "latents")
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
def test_a_model_of_another_grid_computes_the_same_function(positions):
    shape = {"width": 32, "depth": 2, "heads": 2, "positions": positions}
    square = Transformer(TransformerConfig.of_image(12, (4, 4), **shape))
    tall = Transformer(TransformerConfig.of_image(12, (6, 3), **shape))
    for weights in square.parameters():
        torch.nn.init.normal_(weights, std=0.1)
    tall.load_state_dict(square.state_dict())
    x = torch.randn(2, 18, 12)
    levels = NoiseLevels(torch.rand(2, 2), torch.arange(18).expand(2, 18) % 2)
    expected = tall(x, levels).velocity
    actual = square(x, levels, parts=tall.config.parts).velocity
    torch.testing.assert_close(actual, expected)
    wide = (Part("image", 12, (1, 3, 6)),)
    assert not torch.allclose(square(x, levels, parts=wide).velocity, expected)


def test_a_run_trains_resumes_and_samples_any_size(photos, tmp_path, capsys):
    model = ModelConfig(width=32, depth=4, heads=2)
    training = TrainConfig(
        batch=4, steps=6, shards=2, validation=3, save_every=3, log_every=1
    )
    config = Config(name="run", data=options(photos), model=model, training=training)

    class Stop:
        def on_step(self, moment):
            if moment.step == 3:
                moment.run.request("stop")

    run = train(config, tmp_path / "uninterrupted", "cpu", bar=False)
    train(config, tmp_path / "interrupted", "cpu", bar=False, callbacks=[Stop()])
    resumed = train(config, tmp_path / "interrupted", "cpu", bar=False, workers=1)
    assert run.log["flow_loss"].tolist() == resumed.log["flow_loss"].tolist()
    for size in ((10, 6), (4, 4)):
        samples = run.sample(torch.tensor([0]), 2, size=size)["image"]
        assert samples.shape == (1, 3, *size)
    plain = run.sample(torch.tensor([0]), 2)["image"]
    assert torch.equal(plain, run.sample(torch.tensor([0]), 2, size=(8, 8))["image"])
    command = ["sample", str(run.path), "--each", "1", "--steps", "1"]
    capsys.readouterr()
    main([*command, "--size", "10x6"])
    printed = capsys.readouterr().out
    assert "10x6-step-6" in printed
    assert "not trained" not in printed
    main([*command, "--size", "4x4"])
    assert "was not trained on images of 4 x 4" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "--size", "9x9"])
    assert "not divisible by patch 2" in capsys.readouterr().err
    assert Run.open(run.path).sample(torch.tensor([0]), 1, size=(6, 10))
    html = look(config, 8).html()
    assert "tokens)" in html
    assert html.count("data:image/png") > 1


def test_buckets_of_videos_are_refused(photos):
    with pytest.raises(ValueError, match="use data.aspect 1"):
        DataConfig("folder", path="x", signals=("video",), aspect=2)
    with pytest.raises(ValueError, match="expected 1 to 8"):
        DataConfig("folder", path="x", aspect=0.5)
