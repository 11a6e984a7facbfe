"""The command line reads settings, reports mistakes in a line, and ends cleanly."""

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import programs
import pytest
from conftest import TINY
from PIL import Image

from selfflow import __version__, options
from selfflow.analysis.comparison import runs_table
from selfflow.cli import COMMANDS, main
from selfflow.data.options import DataConfig
from selfflow.method.options import (
    FeatureOptions,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    SelfFlowOptions,
    TransformerOptions,
)
from selfflow.options import read_command, read_settings, starting_point
from selfflow.registries import backbones, datasets, objectives
from selfflow.training import checkpoint
from selfflow.training import loop as training
from selfflow.training.config import PRESETS, Config, TrainConfig, differences, flatten
from selfflow.training.run import Run

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config_of():
    "A function from options of `selfflow train` to the config that it would train."
    return lambda *args: read_command(
        COMMANDS, ["train", *args], **starting_point(["train", *args])
    ).keywords["config"]


# settings


def test_without_options_the_default_is_trained(config_of):
    assert config_of() == Config() == config_of("--preset", "digits")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_their_table(config_of, name):
    assert config_of("--preset", name) == PRESETS[name] == config_of(f"--preset={name}")


def test_options_lie_over_a_preset(config_of):
    config = config_of(
        "--training.batch",
        "100",
        "--preset",
        "S",
        "--name",
        "mine",
        "--objective.name",
        "layer_sync",
    )
    assert differences(asdict(PRESETS["S"]), asdict(config)) == {
        "name": ("S", "mine"),
        "training.batch": (256, 100),
        "training.shards": (8, 4),
        "objective.name": ("self_flow", "layer_sync"),
        "objective.rep_weight": (0.8, 0.2),
    }
    assert config_of("--preset", "S", "--model.size", "B").model.width == 768, (
        "a size sets its own width"
    )


def test_the_config_of_a_run_is_a_starting_point(config_of, runs):
    file = str(runs["tiny"].path / "config.json")
    assert config_of("--config", file) == runs["tiny"].config
    again = config_of("--config", file, "--name", "again", "--seed", "3")
    assert again == replace(TINY, name="again", seed=3)
    assert (
        config_of("--config", file, "--objective.name", "repa").objective.rep_weight
        == 0.5
    ), "derived settings are not fixed"


def test_a_renamed_and_moved_run_resumes_in_place(runs, tmp_path, monkeypatch, capsys):
    place = tmp_path / "elsewhere/renamed"
    shutil.copytree(runs["tiny"].path, place)
    for later in ("step-00000008", "step-00000012"):
        shutil.rmtree(place / "checkpoints" / later)
    monkeypatch.chdir(tmp_path)
    main(["train", "--config", "elsewhere/renamed/config.json"])
    run = Run.open(place, "cpu")
    assert run.state()["step"] == 12
    assert run.config == replace(TINY, name="renamed")
    assert run.path == place
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    assert [p.name for p in place.parent.iterdir()] == ["renamed"]
    assert "resuming from step 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "where, file, options, folder, name",
    [
        (".", "runs/b/config.json", [], "runs", "b"),
        ("runs/b", "config.json", [], "..", "b"),
        ("runs", "b/config.json", [], ".", "b"),
        ("runs/b/checkpoints", "../config.json", [], "../..", "b"),
        (".", "runs/b/config.json", ["--folder", "other"], "other", "b"),
        (".", "runs/b/config.json", ["--name", "c"], "runs", "c"),
        (".", "my runs/one run/config.json", ["--name", "c"], "my runs", "c"),
        (".", "kept.json", [], "runs", "tiny"),
        (".", "plain/config.json", [], "runs", "digits"),
    ],
)
def test_the_config_of_a_run_gives_its_folder(
    runs, tmp_path, monkeypatch, where, file, options, folder, name
):
    for place in ("runs/b/config.json", "my runs/one run/config.json", "kept.json"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(runs["tiny"].path / "config.json", tmp_path / place)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/config.json").write_text("{}")
    (tmp_path / "runs/b/checkpoints").mkdir()
    monkeypatch.chdir(tmp_path / where)
    args = ["train", "--config", file, *options]
    asked = {}
    monkeypatch.setattr(
        training,
        "train",
        lambda config, place, *rest, **options: (
            asked.update(config=config, folder=place) or runs["tiny"]
        ),
    )
    main(args)
    assert Path(asked["folder"]).resolve() == Path(folder).resolve()
    assert asked["config"].name == name


def test_a_run_folder_given_as_config_is_answered_with_its_config_file(runs, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--config", str(runs["tiny"].path)])
    assert (
        f"only a folder; use {runs['tiny'].path}/config.json" in capsys.readouterr().err
    )


def test_a_run_of_an_old_format_keeps_its_settings(config_of):
    config = config_of(
        "--config", str(ROOT / "tests/fixtures/runs/format-1/config.json")
    )
    assert config == Run.open(ROOT / "tests/fixtures/runs/format-1", "cpu").config
    assert config.training.shards == 1


def test_a_plain_file_lies_between_preset_and_options(config_of, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text('{"training": {"batch": 12, "lr": 0.5}, "name": "of-the-file"}')
    config = config_of("--preset", "S", "--config", str(file), "--training.lr", "0.25")
    assert (
        config.model.size,
        config.training.batch,
        config.training.lr,
        config.name,
    ) == ("S", 12, 0.25, "of-the-file")
    assert config.training.shards == 4
    assert config_of("--config", str(file)).model == Config().model
    assert read_settings(file) == (json.loads(file.read_text()), False)


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "cannot be used: "),
        ("[]", "it holds no settings by name"),
        ('{"trainin": {}}', "Did you mean 'training'"),
        (
            '{"training": {"step": 3}}',
            "unknown field in training 'step'.*Did you mean 'steps'",
        ),
        ('{"objective": {"mask_ratio": 0.9}}', "outside"),
        ('{"training": {"steps": "3"}}', "expected int"),
        ('{"format": 99, "config": {}}', "format 99"),
        (
            '{"format": 1, "config": {"nam": "x", "training": {}}}',
            "Did you mean 'name'",
        ),
        ('{"format": 1, "config": []}', "cannot be used"),
        ('{"training": 3}', "expected a dict of its fields"),
    ],
)
def test_config_files_that_cannot_be_used_are_refused(tmp_path, capsys, content, words):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", str(tmp_path / "x.json")])
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert re.search(words, message)
    assert message.count("\n") == 1


def test_a_preset_cannot_change_the_config_of_a_run(runs, capsys):
    with pytest.raises(SystemExit):
        main(
            [
                "train",
                "--preset",
                "S",
                "--config",
                str(runs["tiny"].path / "config.json"),
            ]
        )
    assert "preset S would change nothing" in capsys.readouterr().err


# mistakes


@pytest.mark.parametrize(
    "line, words",
    [
        (
            "train --objective.mask-ration 0.1",
            "unknown option --objective.mask-ration; did you mean "
            "--objective.mask-ratio?",
        ),
        ("train --objektive.name x", "did you mean --objective.name?"),
        ("train --mask_ratio=0.1", "did you mean --objective.mask-ratio?"),
        (
            "train --preset digit",
            "unknown preset 'digit'; known are digits, .* Did you mean 'digits'",
        ),
        ("train --confg x", "did you mean --config?"),
        ("train --training.steps many", "invalid literal for int.* 'many'"),
        ("train --training.steps", "Missing value for argument '--training.steps'"),
        ("trian", "unknown command 'trian'.*Did you mean 'train'"),
        ("sample --stepz 5 x", "unknown option --stepz; did you mean --steps?"),
        ("sample", "Missing from selfflow sample: PATH"),
        ("train over there", "Unrecognized options: over, there"),
        ("train --preset", "Missing value for argument '--preset'"),
        ("", "Expected one of"),
        ("--hlep", "did you mean --help?"),
        ("train --xyzxyz 1", "unknown option --xyzxyz .selfflow train --help"),
        (
            "train --objective.name selfflow",
            "unknown objective .*Did you mean 'self_flow'",
        ),
        ("train --config nowhere.json", "there is no config file nowhere.json"),
        ("train --preset S --model.width 512", "width is 512, but size S has 384"),
        ("runs nowhere", "there is no folder nowhere"),
        ("train --seeds 3 5 3", "seeds .3, 5, 3. repeat a seed; name each once"),
        ("train --lora.rank -1", "rank is -1, but must be 0 or more .lora.rank."),
        ("report", "name at least one run folder"),
    ],
)
def test_mistakes_are_reported_in_one_line(capfd, line, words):
    assert_one_line(capfd, line, words)


@pytest.mark.parametrize(
    "line, words",
    [
        ("train --training.steps many", "invalid literal for int.* 'many'"),
        ("sample", "Missing from selfflow sample: PATH"),
        ("", "Expected one of"),
    ],
)
@pytest.mark.parametrize("utf8", [True, False])
def test_messages_in_boxes_of_any_characters_are_read(
    monkeypatch, capfd, line, words, utf8
):
    from tyro import _fmtlib

    monkeypatch.setattr(_fmtlib, "_should_use_utf8_drawing_chars", lambda: utf8)
    assert_one_line(capfd, line, words)


def assert_one_line(capfd, line, words):
    "A mistake ends the command with one short line and status 2."
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    output, message = capfd.readouterr()
    assert stop.value.code == 2
    assert re.search(words.replace("?", r"\?"), message)
    assert not output
    assert message.startswith("selfflow: ")
    assert message.count("\n") == 1
    assert "tyro" not in message
    assert len(message) < 250


def test_the_message_in_a_coloured_box_is_extracted():
    box = (
        "\x1b[31m╭─\x1b[0m Title ─────────╮\n\x1b[31m│\x1b[0m What is "
        "\x1b[1mwrong\x1b[0m │\n│ here.   │\n"
        "│ ─────────── │\n│ More. │\n╰────╯"
    )
    assert options._first_words(box) == "What is wrong here."
    assert options._first_words("no box") == "no box"


# help


def test_help_names_every_field_its_meaning_and_the_default_of_the_preset(
    capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "100")
    helps = {}
    for preset in ("digits", "S"):
        with pytest.raises(SystemExit) as stop:
            main(["train", "--preset", preset, "--help"])
        assert stop.value.code == 0
        text = " ".join(re.sub(r"[│─╭╮╰╯]", " ", capsys.readouterr().out).split())
        helps[preset] = {
            part.split()[0].strip("-,"): part
            for part in re.split(r" (?=--[\w.]+)(?<!, )", text)[1:]
        }
    meanings = {}
    for prefix, part in {
        "": Config,
        "data.": DataConfig,
        "model.": (ModelConfig, TransformerOptions),
        "objective.": (ObjectiveConfig, FeatureOptions, SelfFlowOptions),
        "training.": TrainConfig,
        "lora.": LoraConfig,
    }.items():
        sources = "\n".join(
            map(inspect.getsource, part if isinstance(part, tuple) else (part,))
        )
        # above the field, or behind it
        above = re.findall(r"((?:^    # .+\n)+)    (\w+): ", sources, re.M)
        behind = re.findall(r"^    (\w+): .+?  # (.+)$", sources, re.M)
        meanings |= {
            prefix + name: " ".join(re.findall("# (.+)", text)) for text, name in above
        }
        meanings |= {prefix + name: text for name, text in behind}
    for part, known in {
        "data": datasets,
        "model": backbones,
        "objective": objectives,
    }.items():
        meanings[f"{part}.name"] = f"one of {', '.join(known)}"
    assert meanings.keys() == flatten(asdict(Config())).keys()
    derived = {
        "model.width",
        "model.depth",
        "model.heads",
        "model.positions",
        "training.shards",
        "objective.rep_weight",
        "objective.mask_ratio",
    }
    for name, value in flatten(asdict(PRESETS["S"])).items():
        text = helps["S"][name.replace("_", "-")]
        assert meanings[name] in text, f"{name} is not explained"
        if isinstance(value, tuple):
            value = " ".join(map(str, value))
        assert (
            f"(default: {value if value != '' else repr('')})" in text
            or (value == "" and "(default: )" in text)
            or name in derived
        ), f"{name}: {text}"
    assert helps["digits"]["training.lr"].count("(default: 0.002)") == 1


def test_every_command_explains_its_options(capsys):
    for command, function in COMMANDS.items():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        printed = capsys.readouterr().out
        documented = dict(
            re.findall(
                r"^ +(\w+): (.+)", inspect.getdoc(function).partition("Args:")[2], re.M
            )
        )
        assert sorted(documented) == sorted(inspect.signature(function).parameters)
        text = " ".join(re.sub(r"[│─╭╮╰╯]", " ", printed).split())
        assert all(
            words in text
            for name, words in documented.items()
            if name not in ("config", "options")
        ), command


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "train --help",
        "sample --help",
        "--version",
        "trian",
        "train --objective.mask-ration 0.1",
        "train --preset digit",
    ],
)
def test_help_and_typing_errors_need_no_torch(line):
    script = (
        "import sys; from selfflow.cli import main\ntry: main(sys.argv[1:])\nexcept "
        "SystemExit: pass\n"
        "heavy = sys.modules.keys() & {'torch', 'numpy', 'pandas', 'scipy', 'sklearn', "
        "'matplotlib', 'safetensors'}\n"
        "raise SystemExit(','.join(heavy) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *line.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout or done.stderr.startswith("selfflow: ")


def test_the_version_is_printed_and_presets_are_all_listed(capsys, monkeypatch):
    main(["--version"])
    assert capsys.readouterr().out == f"selfflow {__version__}\n"
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert f"--preset {{{','.join(PRESETS)}}}" in capsys.readouterr().out


# exit status


@pytest.mark.parametrize(
    "error, code, words",
    [
        (
            KeyboardInterrupt("saved"),
            130,
            "interrupted. Nothing was lost; the same command resumes from here.\n",
        ),
        (
            KeyboardInterrupt(),
            130,
            "interrupted. What was not saved is lost; the same command resumes from "
            "the last checkpoint.\n",
        ),
        (SystemExit(143), 143, ""),
        (OSError("the disk is full"), 2, "selfflow: the disk is full"),
        (FloatingPointError("not finite"), 2, "selfflow: not finite"),
        (RuntimeError("out of memory"), 2, "out of memory"),
    ],
)
def test_the_exit_status_shows_how_training_ended(
    monkeypatch, capsys, error, code, words
):
    def stopped(*args, **options):
        raise error

    monkeypatch.setattr(training, "train", stopped)
    with pytest.raises(SystemExit) as stop:
        main(["train"])
    assert stop.value.code == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_training_and_the_same_command_resumes(tmp_path, number, code):
    options = "--preset digits-small --training.log-every 1 --training.steps 100000"
    place = ["--name", "it", "--folder", tmp_path]
    running = programs.Program("-m", "selfflow.cli", "train", *options.split(), *place)
    log = tmp_path / "it/log.jsonl"
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") > 3:
            break
        time.sleep(0.1)
    running.send_signal(number)
    assert running.wait(60) == code
    assert "Traceback" not in running.stderr
    run = Run.open(tmp_path / "it", "cpu")
    assert run.state()["step"] == run.log["step"].iloc[-1] > 3, (
        "the step was finished and saved"
    )
    assert (
        runs_table(tmp_path).loc["it", "state"]
        == f"stopped at step {run.state()['step']}"
    )


def test_interrupting_another_command_promises_no_saved_state(monkeypatch, capsys):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "find_runs", stopped)
    with pytest.raises(SystemExit) as stop:
        main(["runs"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\nselfflow: interrupted.\n"


def test_an_unknown_error_shows_where_it_comes_from(monkeypatch):
    monkeypatch.setattr(training, "train", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train"])
    monkeypatch.setenv("SELFFLOW_TRACEBACK", "1")
    with pytest.raises(ValueError, match="preset"):
        main(["train", "--preset", "M"])


def test_the_module_is_the_command_and_nothing_happens_on_import(tmp_path):
    def call(*args):
        return subprocess.run(
            [sys.executable, *args],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    done = call("-m", "selfflow.cli", "train", "--preset", "M")
    assert done.returncode == 2
    assert done.stderr.startswith("selfflow: unknown preset 'M'")
    assert call("-m", "selfflow.cli", "--help").returncode == 0
    source = (ROOT / "selfflow/cli.py").read_text()
    in_a_notebook = (
        "__name__ = '__main__'; "
        "exec(compile(open('guard.py').read(), 'cell', 'exec')); "
        "print('not called')"
    )
    guard = source[source.index('if __name__ == "__main__"') :]
    (tmp_path / "guard.py").write_text(
        "from pathlib import Path\ndef main(): raise SystemExit(9)\n" + guard
    )
    done = call("-c", in_a_notebook)
    assert done.returncode == 0
    assert done.stdout == "not called\n"
    (tmp_path / "cli.py").write_text((tmp_path / "guard.py").read_text())
    assert call("cli.py").returncode == 9, "the guard itself works"


@pytest.mark.parametrize(
    "typed, written",
    [
        ("--data.name shapes+notes", "--data.0.name shapes --data.1.name notes"),
        (
            "--data.name=shapes+notes --data.shares 0.6+0.4 --data.patch 4 --data.size "
            "16 --data.weights audio=0.5",
            "--data.0.name shapes --data.0.patch 4 --data.0.size 16 --data.0.share 0.6 "
            "--data.1.name notes --data.1.patch 4 --data.1.share 0.4 --data.1.weight "
            "audio 0.5",
        ),
        (
            "--preset scenes --data.weights audio=0.5+video=2",
            "--data.weight audio 0.5 video 2",
        ),
        (
            "--data.name folder --data.path photos --data.signals video+audio",
            "--data.name folder --data.path photos --data.signals video audio",
        ),
        (
            "--data.path photos --data.size 28 --data.name folder",
            "--data.path photos --data.name folder --data.height 28 --data.width 28",
        ),
    ],
)
def test_an_old_command_line_is_answered_with_the_new_one(capsys, typed, written):
    with pytest.raises(SystemExit):
        main(["train", *typed.split()])
    message = capsys.readouterr().err
    assert (
        message
        == "selfflow: several values in one data option are now separate options: "
        f"{written}\n"
    )
    if "photos" not in written:
        preset = typed.split()[:2] if "--preset" in typed else []
        starting_point(["train", *preset, *written.split()])


@pytest.mark.parametrize(
    "typed, words",
    [
        (
            "--data.path x",
            "--data.path is an option of data set folder, huggingface, latents, "
            "fashion, stream; choose one by --data.name",
        ),
        (
            "--data.0.name notes --data.0.size 8",
            "--data.0.size is an option of data set shapes",
        ),
        (
            "--data.1.name notes --data.2.name shapes --data.3.patch 2",
            "--data.3.name is missing",
        ),
        ("--data.0.name folder --data.1.name notes", "data.path is empty"),
        (
            "--data.0.name shapes --data.1.name notes --data.1.condition none",
            "data.1.condition is 'none', but data.0.condition",
        ),
        (
            "--data.0.name shapes --data.0.shar 2",
            "unknown option --data.0.shar; did you mean --data.0.share?",
        ),
        (
            "--data.name shapes --data.weight video 2",
            "unknown signal of data set shapes",
        ),
        ("--data.share 0", "share is 0.0"),
        ("--data.share nan", "share is nan"),
        ("--data.weight -1", "weight is -1"),
    ],
)
def test_invalid_data_settings_are_refused_in_one_line(capsys, tmp_path, typed, words):
    with pytest.raises(SystemExit):
        main(["train", "--folder", str(tmp_path), *typed.split()])
    message = capsys.readouterr().err
    assert words in message
    assert len(message.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_config_file_may_list_data_sets_and_options_change_one(tmp_path):
    file = tmp_path / "two.json"
    file.write_text(
        '{"data": [{"name": "shapes", "share": 3}, {"name": "notes", "weight": '
        '{"audio": 2}}]}'
    )
    first, second = starting_point(
        ["train", "--config", str(file), "--data.1.name", "scenes"]
    )["config"].data
    assert (first.name, first.share, first.size) == ("shapes", 3, 32)
    assert (second.name, second.weight, second.frames) == ("scenes", {"audio": 2}, 16)
    third = starting_point(["train", "--config", str(file), "--data.2.name", "digits"])[
        "config"
    ].data[2]
    assert third.name == "digits"
    assert third.share == 1


@pytest.mark.parametrize("classes", [("cat", "dog"), ("",)])
def test_the_next_commands_are_those_that_work(tmp_path, capsys, classes):
    for number in range(12):
        file = tmp_path / "pictures" / classes[number % len(classes)] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * number).save(file)
    sizes = [
        "--model.width",
        "16",
        "--model.depth",
        "4",
        "--model.heads",
        "2",
        "--training.batch",
        "4",
        "--data.height",
        "8",
        "--data.width",
        "8",
    ]
    main(
        [
            "train",
            "--name",
            "mine",
            "--folder",
            str(tmp_path / "runs"),
            "--data.name",
            "folder",
            "--data.path",
            str(tmp_path / "pictures"),
            "--training.steps",
            "1",
            *sizes,
        ]
    )
    printed = capsys.readouterr().out
    assert "Next: selfflow sample" in printed
    assert ("selfflow probe" in printed) == (len(classes) > 1)


def test_a_preflight_of_a_mistyped_run_creates_no_folder(tmp_path, capsys):
    missing = tmp_path / "mistyped"
    with pytest.raises(SystemExit):
        main(["preflight", "--run", str(missing)])
    assert str(missing) in capsys.readouterr().err
    assert not missing.exists()
