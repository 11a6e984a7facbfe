"""A user's sampler, from Python and from a shell."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selfflow import use
from selfflow.method.sampling import sample

FILE = Path(__file__).with_name("own_sampler.py")


def slope(x, t):
    return x + t


def test_it_is_two_euler_steps():
    use(FILE)
    x1 = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample(slope, x1, 4, "two_halves"), sample(slope, x1, 8, "euler"))


def test_a_shell_draws_with_it(runs):
    command = [sys.executable, "-m", "selfflow.cli", "sample", str(runs["tiny"].path), "--each", "1", "--steps", "2",
               "--method", "two_halves"]
    done = subprocess.run([*command, "--use", str(FILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unknown = subprocess.run(command, capture_output=True, text=True)
    assert unknown.returncode == 2 and "unknown sampler 'two_halves'" in unknown.stderr


@pytest.mark.parametrize("method, options, words", [
    ("eular", {}, "unknown sampler 'eular'.*Did you mean 'euler'"),
    ("euler", {"rtol": 0.1}, "sampler euler has no options, but rtol is given"),
    ("dopri5", {"rtoll": 0.1}, "unknown option of sampler dopri5.*Did you mean 'rtol'"),
])
def test_unknown_names_and_options_are_refused(method, options, words):
    with pytest.raises(ValueError, match=words):
        sample(slope, torch.zeros(2), method=method, **options)
