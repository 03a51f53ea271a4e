"""The examples run, and say so when they fail."""

import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *args, cwd):
    # With the warnings of this process left to it: what matplotlib and scikit-learn
    # deprecate is not the concern of a reader of the example.
    return subprocess.run(
        [sys.executable, EXAMPLES / name, *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_digits_reaches_its_accuracy(tmp_path):
    result = run("digits.py", "--steps", "300", "--seed", "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "test accuracy: 9" in result.stdout
    assert "training: 100%" in result.stderr
    assert (tmp_path / "digits.png").stat().st_size > 10_000


def test_digits_fails_below_its_accuracy(tmp_path):
    out = tmp_path / "few.png"
    result = run("digits.py", "--steps", "4", "--out", str(out), cwd=tmp_path)
    assert result.returncode == 1
    assert "The test accuracy is below 96%" in result.stderr
    assert out.exists()


def test_rnn_state_foresees_better_than_no_change(tmp_path):
    result = run("rnn_state.py", "--seed", "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "relative to a forecast of no change: 0." in result.stdout
    assert "training: 100%" in result.stderr
    assert (tmp_path / "rnn_state.png").stat().st_size > 10_000


def test_rnn_state_fails_above_its_error(tmp_path):
    result = run("rnn_state.py", "--epochs", "1", cwd=tmp_path)
    assert result.returncode == 1
    assert "The relative error is above 0.5" in result.stderr


def test_membrane_finds_the_parameters_in_either_unit(tmp_path):
    result = run("membrane.py", "--seed", "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Mohm" in result.stdout
    assert "Gohm" in result.stdout
    assert "fitting in Gohm: 100%" in result.stderr
    assert (tmp_path / "membrane.png").stat().st_size > 10_000


def test_membrane_fails_when_it_is_not_fitted(tmp_path):
    result = run("membrane.py", "--steps", "2", cwd=tmp_path)
    assert result.returncode == 1
    assert "is off by more than 3%" in result.stderr


def test_hodgkin_huxley_agrees_with_scipy(tmp_path):
    result = run("hodgkin_huxley.py", "--duration", "30", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "largest shift of one: 0.0" in result.stdout
    assert "simulating: 100%" in result.stderr
    assert (tmp_path / "hodgkin_huxley.png").stat().st_size > 10_000


def test_hodgkin_huxley_fails_with_large_steps(tmp_path):
    result = run("hodgkin_huxley.py", "--step", "0.02", cwd=tmp_path)
    assert result.returncode == 1
    assert "That is more than 0.05 ms or 1. mV." in result.stderr


def test_finetune_resumes_with_the_same_numbers(tmp_path):
    result = run("finetune.py", "--seed", "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "resumed in a new process: the same numbers" in result.stdout
    assert "resumed: 100%" in result.stderr
    assert (tmp_path / "finetune.png").stat().st_size > 10_000


def test_finetune_fails_below_its_accuracy(tmp_path):
    result = run("finetune.py", "--steps", "4", cwd=tmp_path)
    assert result.returncode == 1
    assert "The test accuracy is below 96%" in result.stderr


def test_lora_resumes_with_the_same_numbers(tmp_path):
    result = run("lora.py", "--seed", "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "largest difference to the other program: " in result.stdout
    assert "resumed in a new process: the same numbers" in result.stdout
    assert "resumed: 100%" in result.stderr
    assert (tmp_path / "lora.png").stat().st_size > 10_000


def test_lora_fails_below_its_accuracy(tmp_path):
    result = run("lora.py", "--steps", "4", cwd=tmp_path)
    assert result.returncode == 1
    assert "The test accuracy is below 95%" in result.stderr


def test_burgers_pinn_agrees_with_cole_and_hopf(tmp_path):
    result = run("burgers_pinn.py", "--steps", "1500", "--seed", "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "relative L2 error: " in result.stdout
    assert "training: 100%" in result.stderr
    assert (tmp_path / "burgers_pinn.png").stat().st_size > 10_000


def test_burgers_pinn_fails_when_it_is_not_trained(tmp_path):
    result = run("burgers_pinn.py", "--steps", "50", cwd=tmp_path)
    assert result.returncode == 1
    assert "The relative L2 error is above 5%" in result.stderr


def test_multihost_loses_a_process_and_goes_on(tmp_path):
    result = run(
        "multihost.py", "--steps", "120", "--kill-at", "60", "--seed", "1", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "killed one at step 60" in result.stdout
    assert "Process 0 cannot reach the others, one of which may have stopped" in result.stderr
    assert "largest difference of a parameter: " in result.stdout
    assert "training: 100%" in result.stderr
    assert (tmp_path / "multihost.png").stat().st_size > 10_000


def test_multihost_refuses_shares_that_differ(tmp_path):
    result = run("multihost.py", "--processes", "3", cwd=tmp_path)
    assert result.returncode == 1
    assert "`--processes` must divide 256. Got 3." in result.stderr
