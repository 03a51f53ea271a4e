"""The examples run as they stand, and say so when they fail."""

import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parent.parent / "examples"
RESUMED = "resumed in a new process: the same numbers"
KILLED = "multihost.py --steps 120 --kill-at 60 --seed 1"
# What each prints, and reports in the meantime.
RIGHT = {
    "digits.py": (["test accuracy: 9"], ["training: 100%"]),
    "rnn_state.py": (["relative to a forecast of no change: 0."], ["training: 100%"]),
    "membrane.py": (["Mohm", "Gohm"], ["fitting in Gohm: 100%"]),
    "hodgkin_huxley.py": (["largest shift of one: 0.0"], ["simulating: 100%"]),
    "finetune.py": ([RESUMED], ["resumed: 100%"]),
    "lora.py": (["largest difference to the other program: ", RESUMED], ["resumed: 100%"]),
    "burgers_pinn.py": (["relative L2 error: "], ["training: 100%"]),
    "multihost.py": (["largest difference of a parameter: "], ["training: 100%"]),
    KILLED: (
        ["killed one at step 60", "largest difference of a parameter: "],
        [
            "Process 0 cannot reach the others, one of which may have stopped",
            "training: 100%",
        ],
    ),
}
WRONG = {
    "digits.py --steps 4": "The test accuracy is below 96%",
    "rnn_state.py --epochs 1": "The relative error is above 0.5",
    "membrane.py --steps 2": "is off by more than 3%",
    "hodgkin_huxley.py --step 0.02": "That is more than 0.05 ms or 1. mV.",
    "finetune.py --steps 4": "The test accuracy is below 96%",
    "lora.py --steps 4": "The test accuracy is below 95%",
    "burgers_pinn.py --steps 50": "The relative L2 error is above 5%",
    "multihost.py --processes 3": "`--processes` must divide 256. Got 3.",
}


def run(command, cwd):
    file, *args = command.split()
    # With the warnings of this process left to it: what matplotlib and scikit-learn
    # deprecate is not the concern of a reader of the example.
    return subprocess.run(
        [sys.executable, EXAMPLES / file, *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_all_are_here():
    # The front page of the site shows the quickstart, which is run with it.
    names = sorted({path.name for path in EXAMPLES.glob("*.py")} - {"quickstart.py"})
    assert sorted({command.split()[0] for command in RIGHT}) == names
    assert sorted({command.split()[0] for command in WRONG}) == names


@pytest.mark.parametrize("command", RIGHT)
def test_reaches_its_result_and_draws_it(command, tmp_path):
    result = run(command, tmp_path)
    assert result.returncode == 0, result.stderr
    printed, reported = RIGHT[command]
    assert all(text in result.stdout for text in printed)
    assert all(text in result.stderr for text in reported)
    (plot,) = tmp_path.glob("*.png")
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize("command", WRONG)
def test_fails_below_its_result(command, tmp_path):
    result = run(command, tmp_path)
    assert result.returncode == 1
    assert WRONG[command] in result.stderr


def test_draws_where_it_is_told_to_even_if_it_fails(tmp_path):
    run("digits.py --steps 4 --out few.png", tmp_path)
    assert (tmp_path / "few.png").exists()
