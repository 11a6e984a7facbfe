"""A user's sampler, from Python and from a shell."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfflow import use
from selfflow.method.sampling import sample

FILE = Path(__file__).with_name("own_sampler.py")


def slope(x, t):
    return x + t


def test_it_is_two_euler_steps():
    use(FILE)
    x1 = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        sample(slope, x1, 4, "two_halves"), sample(slope, x1, 8, "euler")
    )


def test_a_shell_draws_with_it(runs):
    command = [
        sys.executable,
        "-m",
        "selfflow.cli",
        "sample",
        str(runs["tiny"].path),
        "--each",
        "1",
        "--steps",
        "2",
        "--method",
        "two_halves",
    ]
    done = subprocess.run(
        [*command, "--use", str(FILE)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        [*command[:4], "--help", "--use", str(FILE)], capture_output=True, text=True
    ).stdout
    assert "dopri5, two_halves" in " ".join(listed.replace("│", " ").split())
    unknown = subprocess.run(command, capture_output=True, text=True)
    assert unknown.returncode == 2 and "unknown sampler 'two_halves'" in unknown.stderr


@pytest.mark.parametrize(
    "method, options, words",
    [
        ("eular", {}, "unknown sampler 'eular'.*Did you mean 'euler'"),
        ("euler", {"rtol": 0.1}, "sampler euler has no options, but rtol is given"),
        (
            "dopri5",
            {"rtoll": 0.1},
            "unknown option of sampler dopri5.*Did you mean 'rtol'",
        ),
    ],
)
def test_unknown_names_and_options_are_refused(method, options, words):
    with pytest.raises(ValueError, match=words):
        sample(slope, torch.zeros(2), method=method, **options)


def test_options_reach_a_sampler_from_python_and_from_a_shell(runs):
    run, one = runs["tiny"], torch.tensor([1])
    usual, late = (
        run.sample(one, 3, "sde")["image"],
        run.sample(one, 3, "sde", last=0.3)["image"],
    )
    assert (
        torch.equal(run.sample(one, 3, "sde", last=0.04)["image"], usual)
        and not torch.isclose(late, usual).all()
    )
    command = [
        sys.executable,
        "-m",
        "selfflow.cli",
        "sample",
        str(run.path),
        "--labels",
        "1",
        "--each",
        "1",
        "--steps",
        "3",
        "--method",
        "sde",
        "--last",
    ]
    done = subprocess.run([*command, "0.3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (run.path / "samples").glob("*-sde-last-0.3-3-*.safetensors")
    assert torch.equal(load_file(file)["images"], late)
    refused = subprocess.run(
        [*command[:-1], "--rtol", "0.3"], capture_output=True, text=True
    )
    assert refused.returncode == 2 and "unknown option --rtol" in refused.stderr
