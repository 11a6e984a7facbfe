"""Every data set follows one interface, trains, resumes bit for bit and is sampled.

Several data sets train in turn, and invalid settings are refused with a remedy.
"""

import functools
import json
import shutil
import wave
from dataclasses import replace

import pytest
import torch
from conftest import TINY, assert_same
from PIL import Image

from selfflow.cli import main
from selfflow.data.autoencoder import Haar
from selfflow.data.datasets import DataSet, Examples
from selfflow.data.latents import encode_latents
from selfflow.data.options import DataConfig
from selfflow.data.sources import AudioPatches, Sources, SpectrumCodec, layout_of, load
from selfflow.method.options import ObjectiveConfig
from selfflow.report import sample_sections
from selfflow.training.batches import Batches, Validation
from selfflow.training.config import Config
from selfflow.training.loop import train
from selfflow.training.run import Run, new_backbone

GENERATED = {
    "shapes": "image",
    "emblems": "image",
    "motion": "video",
    "notes": "audio",
    "scenes": "video, audio",
}


def small_data(name, **data):
    "Return the settings of a small data set."
    sizes = {"notes": {}, "latents": {}, "folder": {"height": 16, "width": 16}}
    size = sizes.get(name, {"size": 16})
    return DataConfig(name, **size | {"patch": 8} | data)


def small_run(*data, objective=None, **options):
    "Return the config of a run of six steps on small data."
    data = tuple(
        small_data(item, **options) if isinstance(item, str) else item for item in data
    )
    training = replace(
        TINY.training,
        steps=6,
        batch=8,
        shards=4,
        save_every=3,
        validate_every=3,
        validation=5,
        sample_every=6,
        log_every=1,
    )
    return Config(
        name="small",
        data=data,
        training=training,
        model=replace(TINY.model, width=32, heads=2, depth=4, positions=None),
        objective=objective or ObjectiveConfig(),
    )


# the interface


@pytest.mark.parametrize("name", ["digits", *GENERATED])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_data_set_follows_the_interface(name, split):
    data: DataSet = load(name, split)
    indices = torch.tensor([5, 0, len(data) - 1, 5])
    examples = data.take(indices)
    assert isinstance(examples, Examples)
    assert len(examples) == 4
    assert set(examples.signals) == set(data.shapes)
    for signal, values in examples.signals.items():
        assert values.shape == (4, *data.shapes[signal])
        assert values.dtype == torch.float32
        assert values.isfinite().all()
        assert values.abs().max() <= 1.001
        assert torch.equal(values[0], values[3])
        assert torch.equal(values[1:2], data.take(indices[1:2]).signals[signal])
    assert examples.labels.dtype == torch.int64
    assert 0 <= examples.labels.min()
    assert examples.labels.max() < len(data.names)
    assert len(examples.captions) == 4
    assert all(text and len(text.encode()) <= 64 for text in examples.captions)
    assert all(len(values) == 4 for values in examples.factors.values())
    assert len(data.fingerprint) == 16
    assert load(name, split).fingerprint == data.fingerprint


@pytest.mark.parametrize("name", GENERATED)
def test_splits_of_generated_data_share_no_sample(name):
    firsts = {
        split: load(name, split).take(torch.arange(3)).signals
        for split in ("train", "validation", "test")
    }
    for signal in firsts["train"]:
        assert not torch.equal(firsts["train"][signal], firsts["test"][signal])
        assert not torch.equal(firsts["validation"][signal], firsts["test"][signal])
    with pytest.raises(IndexError, match="of 1000"):
        load(name, "test").take(torch.tensor([1000]))


@pytest.mark.parametrize(
    "name, sound",
    [("shapes", "mel"), ("motion", "mel"), ("notes", "mdct"), ("scenes", "mdct")],
)
def test_tokens_are_converted_back_to_signals(name, sound):
    sources = Sources(DataConfig(name, patch=8, sound=sound), "test")
    examples = sources.data[name].take(torch.arange(3))
    signals = sources.layouts[name].unpatchify(sources.take(name, torch.arange(3)).x0)
    for signal, values in examples.signals.items():
        torch.testing.assert_close(
            signals[signal], values, atol=0 if signal != "audio" else 2e-5, rtol=0
        )
    assert sources.layouts[name].preview(examples.signals).ndim == 4


def test_video_and_audio_share_a_clock():
    data = load("scenes")
    seconds = data.shapes["video"][1] / data.fps
    for part in Sources(DataConfig("scenes", patch=8)).parts:
        count = part.grid[0]
        middles = (part.coordinates()[:, 0].unique() + 0.5) / data.fps
        expected = (torch.arange(count) + 0.5) * seconds / count
        torch.testing.assert_close(middles, expected, atol=1e-5, rtol=1e-5)


def test_spectra_are_cut_without_being_transformed():
    patches = AudioPatches(SpectrumCodec((3, 8)), 2)
    spectra = torch.randn(2, 3, 8)
    assert torch.equal(patches.unpatchify(patches.patchify(spectra)), spectra)
    assert torch.equal(patches.patchify(spectra)[1, 2], spectra[1, :, 4:6].T.flatten())
    with pytest.raises(
        ValueError, match="8 columns is not divisible by data.columns 3"
    ):
        AudioPatches(SpectrumCodec((3, 8)), 3)


# conditions


def test_classes_of_several_data_sets_are_numbered_consecutively():
    sources = Sources((small_data("shapes"), small_data("notes")))
    shape_classes, note_classes = (len(data.names) for data in sources.data.values())
    assert len(sources.names) == shape_classes + note_classes
    assert [[part.name for part in parts] for parts in sources.sequences] == [
        ["image"],
        ["audio"],
    ]
    condition = sources.take("notes", torch.arange(20)).condition
    assert torch.equal(
        condition.values,
        sources.data["notes"].take(torch.arange(20)).labels + shape_classes,
    )
    assert condition.classes == shape_classes + note_classes
    assert sources.condition_for([0, 2], "notes").values.tolist() == [
        shape_classes,
        shape_classes + 2,
    ]
    assert sources.condition_for([1]).values.tolist() == [1]


@pytest.mark.parametrize(
    "condition, values, words",
    [
        ("class", ["a star"], "there is no class 'a star'; did you mean 'star'"),
        ("caption", [1, 2], "conditioned on captions"),
        ("caption", torch.tensor([1, 2]), "pass texts"),
    ],
)
def test_conditions_of_the_wrong_form_are_refused(condition, values, words):
    with pytest.raises(ValueError, match=words):
        Sources(small_data("shapes", condition=condition)).condition_for(values)


# training

CASES = {
    "shapes, captions": small_run("shapes", condition="caption"),
    "motion, first frame": small_run(
        "motion",
        objective=ObjectiveConfig(given="first_frame", given_level=0.2),
        frames=8,
    ),
    "notes": small_run("notes", objective=ObjectiveConfig("sra")),
    "notes, mdct": small_run("notes", sound="mdct", condition="none"),
    "scenes, either": small_run(
        "scenes",
        objective=ObjectiveConfig(given="either", given_share=0.6),
        weight={"audio": 0.5},
    ),
    "scenes, vanilla": small_run("scenes", objective=ObjectiveConfig("flow_matching")),
    "in turn": small_run("shapes", small_data("notes", share=3, weight=2)),
    "in turn, captions": small_run("notes", "scenes", "shapes", condition="caption"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Return the run of a case by its name, trained once; tests must not change it."
    folder = tmp_path_factory.mktemp("trained")
    return functools.cache(
        lambda case: train(CASES[case], folder / case, "cpu", bar=False)
    )


@pytest.mark.parametrize("case", CASES)
def test_every_data_set_trains_and_resumes_bit_for_bit(trained, tmp_path, case):
    run = trained(case)
    assert run.log["step"].tolist() == list(range(1, 7))
    assert run.log["validation_flow_loss"].notna().sum() == 2
    short = Run.open(shutil.copytree(run.path, tmp_path / "small"), "cpu")
    shutil.rmtree(short.checkpoints()[-1])
    again = train(CASES[case], tmp_path, "cpu", workers=1, bar=False)
    assert_same(run, again)
    assert [step for step, *_ in run.sample_history()] == [6]
    assert run.sample_history()[0][1].isfinite().all()


def test_losses_are_logged_by_part_and_by_data_set(trained):
    log = trained("scenes, vanilla").log
    tokens = [part.tokens for part in Sources(CASES["scenes, vanilla"].data).parts]
    expected = (
        tokens[0] * log["flow_loss_video"] + tokens[1] * log["flow_loss_audio"]
    ) / sum(tokens)
    torch.testing.assert_close(
        torch.tensor(log["flow_loss"]), torch.tensor(expected), atol=1e-5, rtol=1e-5
    )
    last = trained("in turn").log.dropna(subset="validation_flow_loss").iloc[-1]
    mean = (
        last["validation_flow_loss_shapes"] + last["validation_flow_loss_notes"]
    ) / 2
    assert last["validation_flow_loss"] == pytest.approx(mean)


def test_data_sets_take_turns_by_their_shares():
    config = CASES["in turn"]
    batches = Batches(Sources(config.data), config)
    names = [batches.name(step) for step in range(1000)]
    assert 0.2 < names.count("shapes") / 1000 < 0.3
    assert names == [batches.name(step) for step in range(1000)]
    for step in range(4):
        batch = batches[step]
        assert [part.name for part in batch.parts] == [
            "image" if names[step] == "shapes" else "audio"
        ]
        assert len(batch) == len(batch.condition) == 8
        halves = [replace(batches, rank=rank, processes=2)[step] for rank in range(2)]
        assert torch.equal(batch.x0, torch.cat([half.x0 for half in halves]))


def test_validation_of_several_data_sets_is_the_same_in_several_processes():
    config = CASES["in turn"]
    validation = Validation.of(config)
    inputs = Sources(config.data).inputs
    torch.manual_seed(0)
    model = new_backbone(config, inputs).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    by_one_process = validation.losses(model, (0.3, 0.8))
    by_three_processes = torch.stack(
        [validation.losses(model, (0.3, 0.8), rank, 3) for rank in range(3)], dim=-1
    ).flatten(1)[:, :10]
    torch.testing.assert_close(by_three_processes, by_one_process)
    assert validation.counts == {"shapes": 5, "notes": 5}


def test_given_tokens_stay_bit_for_bit_and_the_rest_is_generated(trained):
    run = trained("scenes, either")
    known = run.sources.data["scenes"].take(torch.arange(2)).signals
    samples = run.sample([0, 1], steps=3, given={"video": known["video"]})
    assert torch.equal(samples["video"], known["video"])
    assert not torch.equal(samples["audio"], known["audio"])
    with pytest.raises(
        ValueError, match="image is given, but the sequence consists of video, audio"
    ):
        run.sample([0], steps=2, given={"image": torch.zeros(1, 3, 16, 16)})


def test_guidance_works_for_captions(trained):
    run = trained("shapes, captions")
    texts = ["a red star", "étoile", ""]
    plain, guided = (
        run.sample(texts, steps=3, cfg_scale=w)["image"] for w in (1.0, 4.0)
    )
    assert plain.shape == guided.shape == (3, 3, 16, 16)
    assert not torch.equal(plain, guided)
    torch.testing.assert_close(
        plain, run.sample(texts, steps=3, batch=2)["image"], atol=1e-5, rtol=1e-4
    )


# the user's own files


def test_a_folder_of_images_and_its_latents_train(tmp_path, capsys):
    for number in range(40):
        folder = tmp_path / "images" / ("dark", "light")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 24), (number, 40, 128 * (number % 2))).save(
            folder / f"{number}.png"
        )
    config = small_run("folder", path=str(tmp_path / "images"))
    run = train(config, tmp_path / "runs", "cpu", bar=False)
    assert run.inputs.classes == 2
    assert run.sample([0, 1], steps=2)["image"].shape == (2, 3, 16, 16)
    for split in ("train", "validation", "test"):
        images = load(
            "folder", split, path=str(tmp_path / "images"), height=16, width=16
        )
        encode_latents(images, Haar(), tmp_path / "latents", split)
    config = small_run("latents", path=str(tmp_path / "latents"), patch=2)
    run = train(config, tmp_path / "encoded", "cpu", bar=False)
    assert run.config.objective.mask_ratio is None
    assert run.log["flow_loss"].notna().all()
    Image.new("RGB", (20, 24)).save(tmp_path / "images/dark/new.png")
    with pytest.raises(ValueError, match="contains a run with different data"):
        train(
            small_run("folder", path=str(tmp_path / "images")),
            tmp_path / "runs",
            "cpu",
            bar=False,
        )


@pytest.mark.parametrize("signal", ["image", "video"])
def test_images_and_videos_need_not_be_square(tmp_path, signal):
    for number in range(30):
        first, second = (
            Image.new("RGB", (48, 20), (8 * number, level, 99)) for level in (0, 200)
        )
        (tmp_path / "files").mkdir(exist_ok=True)
        first.save(
            tmp_path / f"files/{number}.gif",
            save_all=True,
            append_images=[second],
            duration=100,
        )
    data = DataConfig(
        "folder",
        path=str(tmp_path / "files"),
        signals=(signal,),
        height=8,
        width=24,
        patch=4,
        frames=2,
    )
    run = train(small_run(data), tmp_path / "runs", "cpu", bar=False)
    (part,) = run.inputs.parts
    assert part.grid == (1, 2, 6)
    assert run.log["flow_loss"].notna().all()
    assert run.sample([0, 0], steps=2)[signal].shape[-2:] == (8, 24)
    main(["sample", str(run.path), "--each", "1", "--steps", "1", "--device", "cpu"])
    with pytest.raises(
        ValueError, match="not divisible by patch 5|not divisible by patch 16"
    ):
        Sources(replace(data, patch=16))


# the command line


@pytest.mark.parametrize(
    "name, options, suffixes",
    [
        ("scenes", ["--data.size", "16"], {".safetensors", ".png", ".wav", ".webp"}),
        ("notes", [], {".safetensors", ".png", ".wav"}),
        (
            "shapes",
            ["--data.size", "16", "--data.condition", "caption"],
            {".safetensors", ".png"},
        ),
    ],
)
def test_samples_are_written_as_images_videos_and_audio(
    tmp_path, monkeypatch, name, options, suffixes
):
    monkeypatch.setattr(sample_sections, "_METHOD", "PCA")  # UMAP would compile first
    main(
        [
            "train",
            "--name",
            "cli",
            "--folder",
            str(tmp_path),
            "--data.name",
            name,
            "--data.patch",
            "8",
            "--model.width",
            "32",
            "--model.depth",
            "2",
            "--model.heads",
            "2",
            "--training.steps",
            "2",
            "--training.batch",
            "8",
            "--training.validation",
            "4",
            "--training.sample-every",
            "0",
            "--device",
            "cpu",
            *options,
        ]
    )
    main(
        [
            "sample",
            str(tmp_path / "cli"),
            "--each",
            "1",
            "--steps",
            "2",
            "--device",
            "cpu",
        ]
    )
    files = list((tmp_path / "cli/samples").iterdir())
    audio_files = sum(path.suffix == ".wav" for path in files)
    assert {path.suffix for path in files} == suffixes
    assert len(files) - audio_files == len(suffixes - {".wav"})
    for path in files:
        if path.suffix == ".wav":
            with wave.open(str(path)) as file:
                assert file.getframerate() == 8000
                assert file.getnframes() == 8192
        if path.suffix == ".webp":
            assert Image.open(path).n_frames == 16
    main(["report", str(tmp_path / "cli"), "--output", str(tmp_path / "r.html")])
    assert (tmp_path / "r.html").exists()


# bad input


@pytest.mark.parametrize(
    "values, words",
    [
        ({"name": "shape"}, "Did you mean 'shapes'"),
        ({"name": "folder"}, "needs the path"),
        (
            {"path": "x"},
            "path is an option of data set folder, huggingface, latents, fashion, "
            "stream, which digits does not have",
        ),
        (
            {"name": "notes", "size": 16},
            "size is an option of data set shapes, .*, which notes does not have",
        ),
        (
            {"pach": 4},
            "unknown setting of data set digits 'pach'.*Did you mean 'patch'",
        ),
        ({"share": 0}, "share is 0, but must be greater"),
        ({"share": float("nan")}, "share is nan"),
        ({"share": float("inf")}, "share is inf"),
        ({"share": "2"}, "share is '2', expected float"),
        ({"weight": {"sound": 2}}, "unknown signal of data set digits .*'sound'"),
        ({"weight": -1}, "weight is -1, expected"),
        (
            {"name": "scenes", "weight": {"video": 1, "audio": -0.5}},
            "one for each signal",
        ),
        ({"weight": {}}, "weight is {}"),
        ({"weight": {"image": float("nan")}}, "must be a finite number"),
        ({"weight": "audio"}, r"'audio', expected float \| dict"),
        ({"weight": {"image": "2"}}, "expected float"),
        ({"condition": "text"}, "unknown condition"),
        ({"sound": "mp3"}, "unknown sound"),
        ({"name": "shapes", "size": 0}, "size is 0"),
        ({"caption": -1}, "caption is -1"),
        (
            {"name": "folder", "path": "x", "signals": ("video", "sound")},
            "unknown signal",
        ),
        (
            {"name": "folder", "path": "x", "signals": "video"},
            r"signals is 'video', expected tuple\[str, ...\]",
        ),
        ({"name": "folder", "path": "x", "signals": ("video", "video")}, "each once"),
        (
            {"name": "folder", "path": "x", "signals": ()},
            "one or several of image, video, audio",
        ),
    ],
)
def test_an_invalid_config_is_refused_with_a_remedy(values, words):
    with pytest.raises(ValueError, match=words):
        DataConfig(**values)


@pytest.mark.parametrize(
    "data, objective, words",
    [
        (
            {"name": "shapes", "patch": 5},
            {},
            "not divisible by patch 5; choose a patch from",
        ),
        ({"name": "motion", "span": 3}, {}, "frames 16 is not divisible by patch 3"),
        ({"name": "notes", "columns": 7}, {}, "not divisible by data.columns 7"),
        (
            [{"name": "digits"}, {"name": "shapes"}],
            {},
            "parts of one name and different shapes",
        ),
        (
            [{"name": "shapes"}, {"name": "emblems", "weight": 2}],
            {},
            "data set emblems gives image the weight 2, another one 1",
        ),
        (
            [{"name": "shapes"}, {"name": "notes", "condition": "caption"}],
            {},
            "data.1.condition is 'caption', but data.0.condition",
        ),
        (
            [{"name": "shapes"}, {"name": "notes", "size": 16}],
            {},
            "size is an option of data set shapes.* which notes does not have",
        ),
        (
            [{"name": "shapes"}, "notes"],
            {},
            "data.1 is 'notes', expected a dict of its fields",
        ),
        ([], {}, "data is an empty list"),
        (
            {"name": "shapes"},
            {"given": "audio"},
            "given is 'audio', but the sequence consists of image",
        ),
        ({"name": "notes"}, {"given": "first_frame"}, "first_frame needs video"),
        (
            {"name": "scenes"},
            {"schedule": "full_masking"},
            "needs one mask ratio for all tokens; give objective.mask_ratio",
        ),
    ],
)
def test_a_refused_run_leaves_no_folder(tmp_path, data, objective, words):
    with pytest.raises(ValueError, match=words):
        patch = {"patch": 8}
        data = (
            [item if isinstance(item, str) else patch | item for item in data]
            if isinstance(data, list)
            else patch | data
        )
        config = Config.from_dict({"name": "bad", "data": data, "objective": objective})
        train(config, tmp_path, "cpu", bar=False)
    assert not list(tmp_path.iterdir())


def test_sincos_positions_for_video_are_refused_with_a_remedy(tmp_path):
    config = small_run("motion")
    with pytest.raises(ValueError, match="neither time nor several parts; take rotary"):
        train(
            replace(config, model=replace(config.model, positions="sincos")),
            tmp_path,
            "cpu",
            bar=False,
        )


def test_settings_that_depend_on_the_data_are_filled_in():
    for name, positions, ratio in (
        ("digits", "sincos", 0.25),
        ("shapes", "sincos", 0.25),
        ("motion", "rotary", 0.1),
        ("notes", "rotary", 0.5),
        ("scenes", "rotary", None),
        ("shapes, notes", "rotary", None),
    ):
        names = name.split(", ")
        config = Config(data=tuple(DataConfig(each, patch=8) for each in names))
        assert config.model.positions == positions, name
        assert config.objective.mask_ratio == ratio, name
        assert Config.from_dict(json.loads(json.dumps(config.explicit()))) == config
    objective = ObjectiveConfig(mask_ratio=0.4)
    config = Config(data=DataConfig("motion"), objective=objective)
    assert config.objective.mask_ratio == 0.4


def test_a_run_of_several_parts_opens_from_its_folder_alone(trained):
    run = trained("scenes, either")
    again = Run.open(run.path, "cpu")
    assert again.inputs == run.inputs
    assert again.config == run.config
    assert again.config.data.weight == {"audio": 0.5}
    assert again.sources.weights == {"audio": 0.5}
    assert (
        layout_of(again.sources.data["scenes"], again.config.data).parts
        == run.inputs.parts
    )
