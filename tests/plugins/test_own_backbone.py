"""A user's backbone trains, resumes and is analysed, or is refused in one line.

From a shell, in other processes and from a notebook.
"""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import programs
import pytest
import torch
from shell import shell
from torch import nn

from selfflow.method.backbone import Output
from selfflow.method.options import ModelConfig, ObjectiveConfig
from selfflow.training.config import Config, TrainConfig
from selfflow.training.loop import train
from selfflow.training.run import Run

FILE = Path(__file__).with_name("own_backbone.py")
SMALL = [
    "--model.name",
    "mixer",
    "--model.width",
    "24",
    "--training.batch",
    "16",
    "--training.validation",
    "16",
    "--training.steps",
    "60",
    "--training.save-every",
    "20",
    "--training.log-every",
    "1",
    "--device",
    "cpu",
]


def losses_of(path):
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [
        (
            line["step"],
            line["total"],
            line["rep_loss"],
            line.get("validation_flow_loss"),
        )
        for line in lines
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    command = ["train", "--use", FILE, "--name", "mine", *SMALL, "--workers", "2"]
    (answer,) = shell(folder, command)
    assert answer.status == 0, answer.errors
    return folder


def test_a_killed_run_resumes_to_the_same_losses(trained):
    stored = json.loads((trained / "runs/mine/config.json").read_text())
    assert stored["use"] == [str(FILE)]
    assert stored["config"]["model"] == {"name": "mixer", "width": 24, "depth": 4}
    command = ["train", "--use", FILE, "--name", "killed", *SMALL]
    process = programs.Program("-m", "selfflow.cli", *command, cwd=trained)
    checkpoint = trained / "runs/killed/checkpoints/step-00000020"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    (answer,) = shell(trained, command)
    assert answer.status == 0
    assert "60 steps" in answer.output, answer.errors
    assert losses_of(trained / "runs/killed") == losses_of(trained / "runs/mine")


def test_its_run_works_with_every_command_and_in_the_workbench(trained):
    options = ["--each", "1", "--steps", "2"]
    commands = (
        ["sample", "runs/mine", *options],
        ["probe", "runs/mine", "--samples", "200"],
        ["report", "runs/mine"],
        ["runs"],
        ["export", "runs/mine", "exported"],
        ["sample", "exported", *options],
    )
    for answer in shell(trained, *([*command, "--use", FILE] for command in commands)):
        assert answer.status == 0, answer.errors
    assert (
        "mine: Mixer has no attention maps"
        in (trained / "runs/mine/report.html").read_text()
    )
    code = f"""
from pathlib import Path
from selfflow import load, use
use({str(FILE)!r})
assert load("exported", "cpu").sample([1], steps=1)["image"].shape == (1, 1, 8, 8)
from selfflow.workbench.page import tools_on_page
from selfflow.workbench.tools import Chosen
for tool in tools_on_page():
    made = tool.open(Chosen(Path("runs"), Path("runs/mine")))
    if hasattr(made, "refresh"):
        made.refresh()
    print("OPENED", tool.title, made.message.value if hasattr(made, "message") else "")
"""
    done = programs.run("-c", code, cwd=trained)
    assert done.returncode == 0, done.stderr
    opened = [line for line in done.stdout.splitlines() if line.startswith("OPENED")]
    assert len(opened) >= 5
    assert sum("Mixer has no attention maps" in line for line in opened) == 1, opened
    assert sum('role="alert"' in line for line in opened) == 1, opened


def test_a_missing_plugin_file_is_named_in_one_line(trained):
    for answer in shell(trained, ["sample", "runs/mine"], ["probe", "runs/mine"]):
        assert f"--use {FILE}" in answer.refusal


def test_two_processes_compute_the_same_losses(trained):
    command = ["train", "--use", FILE, "--name", "two", *SMALL, "--processes", "2"]
    (answer,) = shell(trained, command)
    assert answer.status == 0, answer.errors
    for parallel, single in zip(
        losses_of(trained / "runs/two"), losses_of(trained / "runs/mine"), strict=True
    ):
        assert parallel[:3] == pytest.approx(single[:3], rel=1e-3)


class PerToken(nn.Module):
    "A small backbone that the tests below break in various ways."

    def __init__(self, inputs=None, channels=4, width=8):
        super().__init__()
        self.width = width
        self.depth = 2
        self.inward = nn.Linear(channels + 1, width)
        self.outward = nn.Linear(width, channels)

    def forward(self, x, levels, condition=None, taps=(), stop=False, parts=()):
        with_level = torch.cat([x, levels.per_token()[..., None]], dim=-1)
        hidden = self.inward(with_level).relu()
        velocity = None if stop else self.outward(hidden)
        return Output(velocity, dict.fromkeys(taps, hidden))


TINY = Config("given", training=TrainConfig(steps=2, batch=8, validation=8))


def test_a_module_is_trained_from_python_and_needed_to_open_the_run(tmp_path):
    module = PerToken()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run = train(TINY, tmp_path, "cpu", bar=False, backbone=module)
    assert run.config.model == ModelConfig("given")
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), "the module itself is not changed"
    opened = Run.open(run.path, "cpu", backbone=PerToken)
    assert torch.equal(
        opened.sample([3], steps=2)["image"], run.sample([3], steps=2)["image"]
    )
    with pytest.raises(
        ValueError, match=r"open it with the same one: Run.open\(path, backbone=...\)"
    ):
        _ = Run.open(run.path, "cpu").teacher
    with pytest.raises(ValueError, match="do not fit this PerToken .*size mismatch"):
        _ = Run.open(run.path, "cpu", backbone=PerToken(width=16)).teacher
    other = train(replace(TINY, name="other"), tmp_path, "cpu", bar=False)
    with pytest.raises(
        ValueError,
        match="was trained with backbone transformer, not with one that was passed",
    ):
        Run.open(other.path, "cpu", backbone=module)


def test_settings_of_another_backbone_are_refused_for_a_module(tmp_path):
    with pytest.raises(
        ValueError, match="the config has settings of another one, {'width': 64}"
    ):
        train(
            replace(TINY, model=ModelConfig(width=64)),
            tmp_path,
            "cpu",
            bar=False,
            backbone=PerToken,
        )
    with pytest.raises(TypeError, match="backbone is 3; pass an nn.Module"):
        train(TINY, tmp_path, "cpu", bar=False, backbone=3)


def broken(**attributes):
    module = PerToken()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def returning(answer):
    class Answering(PerToken):
        def forward(self, x, levels, condition=None, taps=(), stop=False, parts=()):
            return answer(
                super().forward(x, levels, condition, taps, stop, parts), taps
            )

    return Answering()


def unbuildable(inputs):
    return nn.Linear(inputs.channels, "wide")


TRAINING = TINY.training


@pytest.mark.parametrize(
    "backbone, change, words",
    [
        (broken(width=None), {}, "PerToken.width is None; set self.width in __init__"),
        (broken(depth=0), {}, "PerToken.depth is 0; set self.depth in __init__"),
        (PerToken().requires_grad_(False), {}, "PerToken has no parameters to train"),
        (
            broken(outward=nn.Linear(8, 3)),
            {},
            "PerToken returned velocity of shape (2, 16, 3), expected (2, 16, 4)",
        ),
        (
            broken(width=9),
            {},
            "returned features[1] of shape (2, 16, 8), expected (2, 16, 9)",
        ),
        (
            returning(lambda out, taps: out.velocity),
            {},
            "Answering returned a Tensor; return Output(velocity, features)",
        ),
        (
            returning(lambda out, taps: Output(out.velocity, {})),
            {},
            "layer 1 is missing: keep the hidden states",
        ),
        (
            returning(lambda out, taps: Output(out.velocity / 0, out.features)),
            {},
            "NaN or infinite numbers in velocity",
        ),
        (
            broken(inward=nn.Linear(3, 8)),
            {},
            "PerToken failed on 2 samples of (16, 4) tokens and channels: RuntimeError",
        ),
        (unbuildable, {}, "backbone given  cannot be built for Inputs("),
        (lambda inputs: 3, {}, "made 3, which is no nn.Module"),
        (
            PerToken(),
            {"objective": ObjectiveConfig(teacher_layer=7)},
            "need 1 <= student_layer < teacher_layer <= depth = 2",
        ),
        (
            PerToken(),
            {"objective": ObjectiveConfig(separated=True)},
            "has no argument 'separated', which objective.separated needs",
        ),
        (
            PerToken(),
            {"training": replace(TRAINING, compile=True)},
            "PerToken has no 'blocks', which training.compile needs",
        ),
        (
            PerToken(),
            {"training": replace(TRAINING, optimizer="muon")},
            "which training.optimizer muon needs",
        ),
        (
            PerToken(),
            {"training": replace(TRAINING, parallel="fsdp")},
            "which training.parallel fsdp needs",
        ),
        (
            PerToken(),
            {"training": replace(TRAINING, checkpointing=True)},
            "no 'checkpointing', which training.checkpointing needs",
        ),
    ],
)
def test_an_unsuitable_backbone_is_refused_in_one_line_before_training(
    tmp_path, backbone, change, words
):
    with pytest.raises(ValueError) as error:
        train(
            replace(TINY, name="bad", model=ModelConfig("given"), **change),
            tmp_path,
            "cpu",
            bar=False,
            backbone=backbone,
        )
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "bad").exists()


def test_an_objective_that_reads_too_deep_a_layer_is_refused(tmp_path):
    from selfflow.registries import trial, use

    with trial():
        use(Path(__file__).with_name("own_objective.py"))
        config = replace(
            TINY,
            name="bad",
            model=ModelConfig("given"),
            objective=ObjectiveConfig("clean_view", teacher_layer=5),
        )
        with pytest.raises(
            ValueError,
            match="the objective reads layer 5, but PerToken has depth 2; "
            "take layers from 1 to 2",
        ):
            train(config, tmp_path, "cpu", bar=False, backbone=PerToken)


def test_help_shows_the_options_of_the_named_backbone(tmp_path):
    help_text, misspelled = shell(
        tmp_path,
        ["train", f"--use={FILE}", "--model.name", "mixer", "--help"],
        ["train", "--model.name", "mixr"],
    )
    assert help_text.status == 0
    assert "--model.depth" in help_text.output
    assert "--model.heads" not in help_text.output
    assert "backbone" in misspelled.refusal
    assert "--use" in misspelled.refusal
