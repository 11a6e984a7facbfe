"""Extractors equal the networks they wrap, and the metrics of a run are complete and
detect spoiled samples.
"""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from selfflow import cli
from selfflow.analysis.distances import frechet
from selfflow.analysis.extractors import (
    Extractor,
    _judge_extractor,
    _penultimate,
    built_in,
    inception,
    open_extractor,
)
from selfflow.analysis.factors import HEADS
from selfflow.analysis.judge import judge_for
from selfflow.analysis.sample_metrics import run_metrics
from selfflow.data.datasets import subset
from selfflow.data.options import DataConfig
from selfflow.data.sources import load
from selfflow.training.config import Config
from selfflow.training.run import Run

NAMES = tuple(name for name in HEADS if name != "digits")  # which has no network


def signals_of(name, count, split="test", start=0):
    return load(name, split).take(torch.arange(start, start + count)).signals


# the judges


@pytest.mark.parametrize("name", NAMES)
def test_penultimate_features_give_the_judges_answers(name):
    judge = judge_for(name)
    signals = signals_of(name, 20)
    features = _penultimate(judge, signals)
    read = judge.read(signals)
    assert set(features) == set(judge.readers)
    for view, reader in judge.readers.items():
        for factor, head in reader.heads.items():
            assert torch.equal(head(features[view]).argmax(1), read[factor])


def test_axes_come_from_training_data_and_preserve_distances():
    judge = judge_for("shapes")
    train = signals_of("shapes", 50, "train")
    test = signals_of("shapes", 30)
    extractor = _judge_extractor(judge, train, axes=64)
    assert extractor.recipe["dimensions"] == 50
    assert "50 training samples, 100.0%" in extractor.recipe["axes"]
    parts = _penultimate(judge, train)
    joined = torch.cat(
        [values / values.var(0).sum().sqrt() for values in parts.values()], 1
    )
    features = extractor(train)
    assert np.allclose(features.mean(0), 0, atol=1e-5)
    assert features.var(0, ddof=1).sum() == pytest.approx(len(parts), rel=1e-3)
    distances = np.linalg.norm(features[:9, None] - features[None, :9], axis=-1)
    assert np.allclose(distances, torch.cdist(joined[:9], joined[:9]), atol=1e-3)
    assert np.allclose(
        extractor(test)[3:5], extractor({"image": test["image"][3:5]}), atol=1e-5
    ), "each sample is independent of the batch"
    assert np.all(np.diff(features.var(0)) <= 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_noisy_samples_are_farther_away(name):
    "The noise is strong because the judges were trained with weak noise."
    extractor = built_in(DataConfig(name), count=100)
    real = extractor(signals_of(name, 60))
    second_half = extractor(signals_of(name, 60, start=60))
    noisy = {
        signal: values
        + torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
        for signal, values in signals_of(name, 60, start=60).items()
    }
    assert frechet(real, extractor(noisy)) > 1.5 * frechet(real, second_half)


def test_missing_signals_and_nan_are_refused():
    broken = signals_of("shapes", 3)["image"].clone()
    broken[1, 0, 0, 0] = math.nan
    extractor = built_in(DataConfig("shapes"), count=20)
    for signals, words in (
        ({"audio": broken}, "judge of shapes looks at image, but there is only audio"),
        ({"image": broken}, "1 of 3 image samples are not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            extractor(signals)
    with pytest.raises(ValueError, match="no built-in judge of folder"):
        built_in(DataConfig("folder", path="somewhere"))
    blank = {"image": torch.zeros(2, 1, 8, 8)}
    assert built_in(DataConfig("digits"))(blank).shape == (2, 64)


# weights from a folder or a file


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Tiny models with random weights, saved by transformers: {kind: (folder, network)}."
    transformers = pytest.importorskip("transformers")
    from transformers import models as transformer_models

    torch.manual_seed(0)
    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    audio = {
        "patch_embeds_hidden_size": 8,
        "hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_mel_bins": 8,
        "spec_size": 32,
        "patch_size": 2,
        "patch_stride": [2, 2],
        "window_size": 2,
        "projection_dim": 12,
    }
    clap = transformers.ClapConfig(
        text_config={**small, "vocab_size": 20}, audio_config=audio, projection_dim=12
    )
    made = {
        "dinov2": (
            transformers.Dinov2Model(
                transformers.Dinov2Config(**small, image_size=28, patch_size=14)
            ),
            transformer_models.bit.BitImageProcessor(
                size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
            ),
        ),
        "videomae": (
            transformers.VideoMAEModel(
                transformers.VideoMAEConfig(
                    **small, image_size=16, patch_size=8, num_frames=4
                )
            ),
            transformers.VideoMAEImageProcessor(
                size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
            ),
        ),
        "clap": (
            transformers.ClapModel(clap),
            transformers.ClapFeatureExtractor(
                feature_size=8,
                sampling_rate=16000,
                max_length_s=1,
                truncation="rand_trunc",
                padding="repeatpad",
            ),
        ),
    }
    folders = {}
    for kind, (network, processor) in made.items():
        folders[kind] = tmp_path_factory.mktemp(kind), network.eval()
        for saved in (network, processor):
            saved.save_pretrained(folders[kind][0])
    return folders


def test_dinov2_features_are_the_class_token_of_processed_images(models):
    folder, network = models["dinov2"]
    images = torch.rand(3, 3, 28, 28) * 2 - 1
    features = open_extractor(folder, batch=2)({"image": images})
    processing = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (
        torch.tensor(processing[key])[:, None, None]
        for key in ("image_mean", "image_std")
    )
    pixels = (((images + 1) * 127.5).round() / 255 - mean) / std
    with torch.no_grad():
        assert np.allclose(features, network(pixels).last_hidden_state[:, 0], atol=1e-4)
    grey = open_extractor(folder)({"image": images[:, :1]})
    assert np.allclose(
        grey, open_extractor(folder)({"image": images[:, :1].expand(-1, 3, -1, -1)})
    )


def test_videomae_features_are_the_mean_token_of_evenly_spaced_frames(models):
    folder, network = models["videomae"]
    videos = torch.rand(2, 3, 7, 16, 16) * 2 - 1
    features = open_extractor(folder)({"video": videos})
    processing = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (
        torch.tensor(processing[key])[:, None, None]
        for key in ("image_mean", "image_std")
    )
    frames = videos[:, :, [0, 2, 4, 6]].transpose(1, 2)
    pixels = (((frames + 1) * 127.5).round() / 255 - mean) / std
    with torch.no_grad():
        assert np.allclose(
            features, network(pixels).last_hidden_state.mean(1), atol=1e-4
        )


def test_clap_resamples_audio_to_its_own_rate(models):
    folder, _ = models["clap"]
    tone = torch.sin(2 * math.pi * 440 * torch.arange(8000) / 8000).repeat(
        3, 1
    ) * torch.tensor([[1.0], [0.5], [0.01]])
    extractor = open_extractor(folder)
    features = extractor({"audio": tone})
    assert features.shape == (3, 12)
    assert np.isfinite(features).all()
    assert extractor.recipe["resize"] == "16000 samples a second"
    double_rate = torch.sin(2 * math.pi * 440 * torch.arange(16000) / 16000)[None]
    at_double_rate = open_extractor(folder, rate=16000)({"audio": double_rate})
    assert np.linalg.norm(features[0] - at_double_rate[0]) < 0.2 * np.linalg.norm(
        features[0] - features[2]
    )


def test_inception_equals_torch_fidelity_with_weights_of_a_file(tmp_path):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    # its network with random weights, which become the file
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            module.FeatureExtractorInceptionV3,
            "load_state_dict",
            lambda self, state: None,
        )
        patched.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    images = torch.rand(2, 3, 20, 20) * 2 - 1
    extractor = open_extractor(tmp_path / "weights.safetensors")
    expected = network(((images + 1) * 127.5).round().byte())[0]
    assert np.allclose(extractor({"image": images}), expected, atol=1e-5)
    assert extractor.recipe["dimensions"] == 2048
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for call, error, words in (
        (
            lambda: inception(tmp_path / "other.safetensors"),
            ValueError,
            "does not fit InceptionV3",
        ),
        (
            lambda: inception(tmp_path / "none.pth"),
            FileNotFoundError,
            "nothing is downloaded",
        ),
    ):
        with pytest.raises(error, match=words):
            call()


def test_damaged_files_and_other_models_are_refused(tmp_path, models):
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    # a pickle can run commands
    (tmp_path / "x.pth").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    for name in ("x.safetensors", "x.pth"):
        with pytest.raises(ValueError, match=f"{name} (cannot be read|holds more)"):
            inception(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        open_extractor(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match="unknown model_type 'bert'; known are dinov2, clap, videomae"
    ):
        open_extractor(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded: "):
        open_extractor(tmp_path)
    with pytest.raises(
        ValueError, match="dinov2 looks at image, but there is only audio"
    ):
        open_extractor(models["dinov2"][0])({"audio": torch.zeros(2, 100)})


# metrics of a run


def stand_in(path, name, condition, spoiled=0):
    "A run that draws validation examples, the first of them spoiled."
    source = load(name, "validation")

    def draw(conditions, **options):
        signals = {
            key: values.clone()
            for key, values in source.take(
                subset(source, len(conditions))
            ).signals.items()
        }
        for values in signals.values():
            values[:spoiled] = torch.randn(
                values[:spoiled].shape, generator=torch.Generator().manual_seed(0)
            ).clamp(-1, 1)
        return signals

    data = DataConfig(
        name, patch=2 if name in ("digits", "notes") else 8, condition=condition
    )
    return SimpleNamespace(
        path=path,
        records=path,
        sample=draw,
        state=lambda: {"step": 7},
        device=torch.device("cpu"),
        shift=1.0,
        config=Config(data=data),
    )


@pytest.mark.parametrize(
    "name, condition",
    [
        ("digits", "class"),
        ("shapes", "caption"),
        ("notes", "class"),
        ("scenes", "none"),
    ],
)
def test_real_samples_have_the_metrics_of_the_floor(tmp_path, name, condition):
    run = stand_in(tmp_path, name, condition)
    metrics = run_metrics(
        run, 40, 2, 1.5, 4, extractor=built_in(run.config.data, count=64), resamples=3
    )
    assert metrics.drawn == metrics.floor
    assert "Frechet distance" in metrics.doubts[0]
    assert (
        set(metrics.judged)
        == {
            "digits": {"digit", "all"},
            "shapes": {"kind", "colour", "ground", "place", "all"},
            "notes": {"pitch", "all"},
            "scenes": set(),
        }[name]
    )
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["drawn"]["recall"]["value"] == metrics.drawn["recall"].value
    assert stored["recipe"] == metrics.recipe
    settings = {
        "count": 40,
        "steps": 2,
        "cfg_scale": 1.5,
        "seed": 4,
        "step": 7,
        "neighbours": 5,
        "resamples": 3,
        "data": name,
    }
    assert metrics.recipe.items() >= settings.items()
    assert {
        "features",
        "dimensions",
        "torch",
        "device",
        "floor",
    } <= set(metrics.recipe)
    assert "steps 2" in str(metrics)
    assert "<table" in metrics._repr_html_()


def test_every_metric_detects_spoiled_samples(tmp_path):
    metrics = run_metrics(
        stand_in(tmp_path, "digits", "class", spoiled=60), count=120, resamples=4
    )
    for name in ("Frechet distance", "kernel distance", "sliced Wasserstein"):
        assert metrics.drawn[name].value > 2 * metrics.floor[name].value
    assert (
        metrics.drawn["precision"].value < 0.6 < 0.8 < metrics.floor["precision"].value
    )
    with pytest.raises(
        ValueError, match="11 samples are too few for halves with 5 neighbours; take 12"
    ):
        run_metrics(stand_in(tmp_path, "digits", "class"), count=11)


def test_a_custom_extractor_is_used(tmp_path):
    calls = []

    def four_pixels(signals):
        calls.append(len(signals["image"]))
        return signals["image"].flatten(1)[:, 20:24].numpy()

    extractor = Extractor(four_pixels, {"features": "four"})
    metrics = run_metrics(
        stand_in(tmp_path, "digits", "none"), count=30, extractor=extractor, resamples=0
    )
    assert calls == [30, 30, 30]
    assert metrics.recipe["features"] == "four"
    assert metrics.drawn["recall"].interval is None
    assert not metrics.judged


def test_the_command_measures_a_run(runs, tmp_path, capsys, monkeypatch):
    source = runs["tiny"].path
    copied = tmp_path / "run"
    copied.mkdir()
    for name in ("config.json", "checkpoints"):
        (copied / name).symlink_to(source / name)
    cli.main(
        [
            "metrics",
            str(copied),
            "--count",
            "24",
            "--steps",
            "2",
            "--resamples",
            "2",
            "--device",
            "cpu",
        ]
    )
    printed = capsys.readouterr().out
    assert "Frechet distance" in printed
    assert "judged right: digit" in printed
    assert f"{copied}/metrics.json" in printed
    stored = json.loads((copied / "metrics.json").read_text())
    assert stored["recipe"]["step"] == Run.open(copied, "cpu").state()["step"] == 12
    with pytest.raises(SystemExit):
        cli.main(
            [
                "metrics",
                str(copied),
                "--extractor",
                str(tmp_path / "none"),
                "--device",
                "cpu",
            ]
        )
    assert "holds no model" in capsys.readouterr().err
