"""Several processes, with DDP or FSDP, train the same model as one process."""

import json
import os
import shutil
import signal
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path

import programs
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file

from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources
from selfflow.method.alignment import (
    constant_cosine,
    effective_rank,
    masked_mean,
    rank_of_products,
)
from selfflow.method.losses import Alignment
from selfflow.method.options import LoraConfig, ObjectiveConfig
from selfflow.training import processes
from selfflow.training.batches import shards_of
from selfflow.training.config import Config, TrainConfig
from selfflow.training.export import export
from selfflow.training.lock import RunInUse
from selfflow.training.loop import train
from selfflow.training.processes import Processes, launch
from selfflow.training.run import Run

SEVERAL = Path(__file__).parents[1] / "several.py"
# most kinds of losses: the second step already starts from averaged gradients
FOUR = replace(
    TINY, training=replace(TINY.training, steps=4, save_every=4, validate_every=2)
)
LONGER = replace(
    TINY,
    training=replace(
        TINY.training, steps=24, save_every=12, validate_every=12, sample_every=12
    ),
)
SHAPES_NOTES = DataConfig("shapes", size=16, patch=8), DataConfig("notes", patch=8)


def of_parts(data, **training):
    "A run of several kinds of tokens, together or in turn."
    return replace(
        FOUR,
        data=data,
        model=replace(FOUR.model, positions="rotary"),
        objective=ObjectiveConfig(mask_ratio=None),
        training=replace(FOUR.training, validation=6, **training),
    )


TASKS = {  # name: (config, what else)
    "ddp": (LONGER, {}),
    "fsdp": (replace(LONGER, training=replace(LONGER.training, parallel="fsdp")), {}),
    "flow": (replace(FOUR, objective=ObjectiveConfig("flow_matching")), {}),
    "masked": (
        replace(
            FOUR,
            objective=ObjectiveConfig(
                rep_tokens="masked",
                flow_tokens="noisier",
                normalise="centred",
                distance="l2",
            ),
        ),
        {},
    ),
    "standardised": (
        replace(FOUR, objective=ObjectiveConfig("sra", normalise="standardised")),
        {},
    ),
    "layer_sync": (
        replace(
            FOUR,
            objective=ObjectiveConfig("layer_sync"),
            training=replace(FOUR.training, parallel="fsdp"),
        ),
        {},
    ),
    "repa": (replace(FOUR, objective=ObjectiveConfig("repa")), {"features": True}),
    "shared": (
        replace(
            FOUR,
            model=replace(
                FOUR.model,
                modulation="shared",
                positions="rotary",
                mlp="swiglu",
                qk_norm=True,
            ),
            training=replace(FOUR.training, parallel="fsdp", checkpointing=True),
        ),
        {},
    ),
    "accumulate": (replace(FOUR, training=replace(FOUR.training, accumulate=2)), {}),
    "accumulate-standardised": (
        replace(
            FOUR,
            objective=ObjectiveConfig(rep_tokens="masked", normalise="standardised"),
            training=replace(FOUR.training, accumulate=4),
        ),
        {},
    ),
    "accumulate-layer_sync": (
        replace(
            FOUR,
            objective=ObjectiveConfig("layer_sync", normalise="centred"),
            training=replace(FOUR.training, accumulate=2, parallel="fsdp"),
        ),
        {},
    ),
    "accumulate-fsdp": (
        replace(
            TINY,
            training=replace(
                TINY.training,
                accumulate=2,
                parallel="fsdp",
                ema={"short": 0.1},
                power_ema=(0.1,),
                snapshot_every=12,
                evaluated="short",
            ),
        ),
        {},
    ),
    "muon": (
        replace(
            TINY,
            training=replace(
                TINY.training, optimizer="muon", parallel="fsdp", weight_decay=0.1
            ),
        ),
        {},
    ),
    "bf16": (replace(FOUR, training=replace(FOUR.training, precision="bf16")), {}),
    "joint": (of_parts(DataConfig("scenes", size=16, patch=8)), {}),
    "in turn": (of_parts(SHAPES_NOTES), {}),
    "in turn-fsdp": (of_parts(SHAPES_NOTES, parallel="fsdp"), {}),
    "poisoned": (TINY, {"poison": 6}),
    "stopped": (TINY, {"stop": 5}),
    "undividable": (replace(TINY, training=replace(TINY.training, shards=1)), {}),
}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ranks(rank, count):
    "The variables by which torchrun tells a process its place among others."
    places = {"RANK": rank, "LOCAL_RANK": rank}
    counts = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    return {name: str(value) for name, value in (places | counts).items()}


def start(tasks, count, folder, launcher=()):
    """Run tasks {name: (config, what else)} in `count` processes of one start.

    Each runs in a folder of its own name. The processes are started here with the
    variables that torchrun sets, or by a launcher: a module and its options.
    """
    file = folder / "tasks.json"
    file.write_text(
        json.dumps(
            [
                {"config": asdict(config), "folder": str(folder / name), **more}
                for name, (config, more) in tasks.items()
            ]
        )
    )
    if launcher:
        done = programs.run("-m", *launcher, count, SEVERAL, file)
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        return folder
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        programs.Program(
            SEVERAL, file, env={**os.environ, **place, **ranks(rank, count)}
        )
        for rank in range(count)
    ]
    for program in started:
        assert program.wait() == 0, program.stdout + program.stderr[-4000:]
    return folder


def raised(folder, count=2):
    return [
        json.loads((folder / f"raised-{rank}-of-{count}.json").read_text())
        for rank in range(count)
    ]


@pytest.fixture(scope="module")
def tasks(runs, tmp_path_factory):
    "All tasks, those with adapters on an exported run included."
    base = export(runs["tiny"], tmp_path_factory.mktemp("base") / "tiny")
    training = replace(TINY.training, start_from=str(base), sample_every=0)
    adapted = {
        parallel: replace(
            TINY,
            training=replace(training, parallel=parallel, checkpointing=recomputed),
            lora=LoraConfig(2, dora=True),
        )
        for parallel, recomputed in (("ddp", False), ("fsdp", True))
    }
    return TASKS | {
        "lora-ddp": (adapted["ddp"], {}),
        "lora-fsdp": (adapted["fsdp"], {}),
    }


@pytest.fixture(scope="module")
def two(tasks, tmp_path_factory):
    "All tasks in two processes."
    return start(tasks, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one(tasks, tmp_path_factory):
    "The same runs in one process, by name, as they are asked for."
    folder = tmp_path_factory.mktemp("one")
    known = {}

    def run(name):
        if name not in known:
            config, more = tasks[name]
            features = None
            if more.get("features"):
                sources = Sources(config.data)
                (name,) = sources.data
                tokens = sources.take(name, torch.arange(len(sources.data[name]))).x0
                features = torch.cat([tokens, -tokens], -1)
            known[name] = train(config, folder / name, "cpu", features)
        return known[name]

    return run


def assert_close(run, expected, rtol=1e-5):
    log = run.log
    expected_log = expected.log
    assert log.columns.tolist() == expected_log.columns.tolist()
    assert log["step"].tolist() == expected_log["step"].tolist()
    for name in expected_log.columns.drop("flow_loss_by_level"):
        actual_values = torch.tensor(log[name])
        expected_values = torch.tensor(expected_log[name])
        torch.testing.assert_close(
            actual_values,
            expected_values,
            rtol=rtol,
            atol=1e-7,
            equal_nan=True,
            msg=name,
        )
    levels = [
        torch.tensor(table["flow_loss_by_level"].dropna().tolist())
        for table in (log, expected_log)
    ]
    torch.testing.assert_close(*levels, rtol=rtol, atol=0)


def apart(run, expected, part):
    "Return how far all tensors of a part are apart, relative to their norm."
    actual = run.load(part)
    reference = expected.load(part)
    assert actual.keys() == reference.keys()
    # not counts of steps, which are equal and large
    names = [name for name, value in reference.items() if value.ndim]
    difference = [(actual[name] - reference[name]).norm() for name in names]
    norms = [reference[name].norm() for name in names]
    return (torch.stack(difference).norm() / torch.stack(norms).norm()).item()


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_dozen_steps_in_two_processes_have_the_losses_of_one(two, one, name):
    run = Run.open(two / name / "tiny")
    expected = one("ddp")
    assert raised(two / name) == [None, None]
    assert len(run.log) == 24
    assert (run.timing["processes"] == 2).all()
    assert_close(run, expected)
    for part in ("model", "teacher", "objective"):
        # biases of keys have no gradient but rounding, which Adam enlarges
        assert apart(run, expected, part) < 1e-4
    actual, reference = (r.load("optimizer") for r in (run, expected))
    assert actual.keys() == reference.keys()
    assert all(actual[key].shape == reference[key].shape for key in reference)
    (step, images, labels), (_, expected_images, _) = (
        run.sample_history()[-1],
        expected.sample_history()[-1],
    )
    assert step == 24
    assert labels.tolist() == list(range(10))
    assert (images - expected_images).abs().max() < 1e-3


@pytest.mark.parametrize(
    "name",
    [
        "flow",
        "masked",
        "standardised",
        "layer_sync",
        "repa",
        "shared",
        "accumulate",
        "accumulate-standardised",
        "accumulate-layer_sync",
        "accumulate-fsdp",
        "joint",
        "in turn",
        "in turn-fsdp",
    ],
)
def test_every_kind_of_loss_is_that_of_one_process(two, one, name):
    assert raised(two / name) == [None, None]
    assert_close(Run.open(two / name / "tiny"), one(name))


# adapters are recomputed in the backward pass if they are sharded
@pytest.mark.parametrize("name", ["muon", "lora-ddp", "lora-fsdp"])
def test_muon_and_adapters_are_those_of_one_process(two, one, tmp_path, name):
    assert raised(two / name) == [None, None]
    run, expected = Run.open(two / name / "tiny"), one(name.replace("fsdp", "ddp"))
    assert_equal_training(run, expected)
    shutil.copytree(two / name, tmp_path / name)
    shutil.rmtree(tmp_path / name / "tiny/checkpoints/step-00000012")
    assert_equal_training(train(run.config, tmp_path / name, "cpu"), expected)


def assert_equal_training(run, expected):
    "Losses and weights are equal; Muon rounds to bfloat16, which enlarges differences."
    exact = run.config.training.optimizer != "muon"
    assert_close(run, expected, rtol=1e-5 if exact else 1e-3)
    for part in ("model", "teacher", "objective", "optimizer"):
        assert apart(run, expected, part) < (1e-4 if exact else 1e-3), part


def test_averages_of_sharded_weights_are_those_of_one_process(two, one):
    run = Run.open(two / "accumulate-fsdp/tiny")
    expected = one("accumulate-fsdp")
    for part in ("average-short", "average-power-0.1"):
        assert apart(run, expected, part) < 1e-4
    (snapshot,) = run.snapshots()
    stored = load_file(snapshot / "average-power-0.1.safetensors")
    assert all(torch.equal(v, stored[k]) for k, v in run.load(part).items())


def test_bf16_in_two_processes(two, one):
    losses, expected = (
        run.log["flow_loss"].tolist()
        for run in (Run.open(two / "bf16/tiny"), one("bf16"))
    )
    assert losses == pytest.approx(expected, rel=0.01)


def test_non_finite_numbers_in_one_process_stop_all(two):
    first, second = raised(two / "poisoned")
    assert first == second
    assert first.startswith("FloatingPointError: step 7 is not finite")
    run = Run.open(two / "poisoned/tiny")
    report = json.loads((run.path / "not_finite.json").read_text())
    assert run.state()["step"] == 4
    assert report["step"] == 7
    assert len(report["samples"]) == 16
    assert run.log["step"].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_signal_to_one_process_stops_all_and_one_process_resumes(two, runs, tmp_path):
    assert raised(two / "stopped") == [None, None]  # the main process got no signal
    run = Run.open(two / "stopped/tiny")
    assert run.state()["step"] == 5
    assert run.writer() is None
    shutil.copytree(two / "stopped", tmp_path / "stopped")
    assert_close(train(TINY, tmp_path / "stopped"), runs["tiny"])


def test_a_run_resumes_with_other_processes_and_parallelism(two, one, tasks, tmp_path):
    "FSDP on two, then one, then DDP on two: the losses of a run that one process"
    "trained. With Muon and adapters: one, then FSDP on two."
    shutil.copytree(two / "fsdp", tmp_path / "fsdp")
    shutil.rmtree(tmp_path / "fsdp/tiny/checkpoints/step-00000024")
    assert_close(train(LONGER, tmp_path / "fsdp"), one("ddp"))
    shutil.rmtree(tmp_path / "fsdp/tiny/checkpoints/step-00000024")
    sharded = {name: tasks[name] for name in ("muon", "lora-fsdp")}
    for name in sharded:
        shutil.copytree(one(name).path, tmp_path / name / "tiny")
        shutil.rmtree(tmp_path / name / "tiny/checkpoints/step-00000012")
    start({"fsdp": TASKS["ddp"], **sharded}, 2, tmp_path)
    for name in sharded:
        assert_equal_training(Run.open(tmp_path / name / "tiny"), one(name))
    run = Run.open(tmp_path / "fsdp/tiny")
    assert run.state()["processes"] == 2
    assert run.state()["step"] == 24
    assert_close(run, one("ddp"))


def test_shards_that_cannot_be_divided_are_refused_before_anything_is_written(two):
    for words in raised(two / "undividable"):
        assert words.startswith(
            "ValueError: 1 shards cannot be divided among 2 processes"
        )
        assert "training.shards 2" in words
    assert not (two / "undividable/tiny").exists()


@pytest.mark.parametrize(
    "shards, accumulate, processes", [(8, 1, 3), (4, 4, 2), (1, 1, 2)]
)
def test_shards_are_divided_or_refused(shards, accumulate, processes):
    with pytest.raises(ValueError, match="cannot be divided"):
        shards_of(
            TrainConfig(
                batch=24 if shards != 1 else 8, shards=shards, accumulate=accumulate
            ),
            0,
            processes,
        )
    assert [list(shards_of(TrainConfig(shards=8), rank, 4)) for rank in range(4)] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]


def test_accelerate_launches_too_and_four_processes_have_the_losses_of_one(
    tmp_path, one
):
    launcher = (
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--num_cpu_threads_per_process",
        "1",
        "--num_processes",
    )
    start({"ddp": TASKS["ddp"]}, 4, tmp_path, launcher)
    run = Run.open(tmp_path / "ddp/tiny")
    assert (run.timing["processes"] == 4).all()
    assert_close(run, one("ddp"))


def test_two_nodes_by_the_commands_of_the_notebook(tmp_path, one):
    "Two torchruns that find each other, one process each, as on two machines that"
    "share a file system."
    config, _ = TASKS["flow"]
    (tmp_path / "tasks.json").write_text(
        json.dumps([{"config": asdict(config), "folder": str(tmp_path / "flow")}])
    )
    command = [
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{free_port()}",
        "--rdzv-id",
        "tiny",
        SEVERAL,
        tmp_path / "tasks.json",
    ]
    nodes = [programs.Program(*command) for _ in range(2)]
    for node in nodes:
        assert node.wait(300) == 0, node.stderr
    assert raised(tmp_path / "flow") == [None, None]
    assert_close(Run.open(tmp_path / "flow/tiny"), one("flow"))


def test_a_notebook_starts_processes_and_follows_them(tmp_path, runs):
    run = launch(
        replace(TINY, training=replace(TINY.training, parallel="fsdp")),
        2,
        tmp_path,
        "cpu",
    )
    assert run.state()["step"] == 12
    assert run.timing["processes"].tolist() == [2] * 12
    assert_close(run, runs["tiny"])
    with pytest.raises(ChildProcessError, match="different settings"):
        launch(replace(TINY, seed=1), 2, tmp_path, "cpu")
    assert Run.open(tmp_path / "tiny").config.seed == 0


def test_the_command_starts_processes_and_forwards_stop_requests(tmp_path):
    options = (
        f"--name long --folder {tmp_path} --preset digits-small --device cpu "
        "--processes 2 --training.steps 100000"
    )
    program = programs.Program("-m", "selfflow.cli", "train", *options.split())
    end = time.monotonic() + 120
    while not (log := tmp_path / "long/log.jsonl").exists() or not log.stat().st_size:
        assert time.monotonic() < end
        assert program.poll() is None
        time.sleep(0.05)
    with pytest.raises(RunInUse):
        launch(Config(name="long"), 2, tmp_path, "cpu")
    program.send_signal(signal.SIGTERM)
    status = program.wait(60)
    run = Run.open(tmp_path / "long")
    assert status == 143, program.stderr
    words = (
        f"long: stopped as requested after step {run.state()['step']} of 100000, which "
        "is saved"
    )
    message = program.stdout
    assert message.count(words) == 1, "the main process alone prints"
    assert "FutureWarning" not in message
    assert "%|" not in message
    assert run.writer() is None
    assert (run.timing["processes"] == 2).all()


def test_an_abort_after_a_message_is_no_kill():
    report = "rank : {rank} (local_rank: 0)\n  exitcode  : -{signal} (pid: 7) (it)\n"
    aborted = report.format(rank=0, signal=6)
    message = "selfflow: tiny contains a run with different settings\n"
    assert processes._killed(aborted).startswith("process 0 was killed by SIGABRT")
    assert processes._killed(message + aborted) == ""
    killed = report.format(rank=1, signal=9)
    assert "process 1 was killed by SIGKILL" in processes._killed(message + killed)


def test_a_single_process_sends_nothing():
    alone = Processes.start("cpu")
    g = torch.Generator().manual_seed(0)
    assert (alone.rank, alone.count, alone.main) == (0, 1, True)
    assert alone.on_main(lambda: 3) == 3
    assert alone.broadcast(4) == 4
    assert alone.any(False, True) == [False, True]
    values = torch.randn(3, 5, generator=g)
    counted = torch.rand(3, 5, generator=g) < 0.5
    torch.testing.assert_close(masked_mean(values, counted), values[counted].mean())
    assert masked_mean(values, torch.zeros_like(counted)) == 0
    rows = torch.randn(40, 6, generator=g)
    direction = torch.nn.functional.normalize(rows, dim=-1).mean(0).norm()
    torch.testing.assert_close(constant_cosine(rows), direction)
    # two processes that hold the same
    centred = rows.double() - rows.double().mean(0)
    doubled = rank_of_products(2 * centred.mT @ centred, rows.abs().max())
    torch.testing.assert_close(doubled, effective_rank(torch.cat([rows, rows])))
    teacher_rows = torch.randn(40, 6, generator=g)
    cosine = torch.nn.functional.cosine_similarity(rows, teacher_rows, dim=-1)
    assert Alignment(rows, teacher_rows, torch.zeros(40)).means()[
        "cosine"
    ] == pytest.approx(cosine.mean().item(), rel=1e-5)


def test_write_errors_of_the_main_process_are_reported(tmp_path):
    run = train(TINY, tmp_path)
    for folder in ("checkpoints/step-00000012", "checkpoints/step-00000008", "samples"):
        shutil.rmtree(run.path / folder)
    (run.path / "samples").write_text("a file where a folder is wanted")
    with pytest.raises(
        ChildProcessError, match="selfflow: .*samples/film.* could not be written"
    ):
        launch(TINY, 2, tmp_path, "cpu")
    (run.path / "samples").unlink()
    assert train(TINY, tmp_path).state()["step"] == 12
