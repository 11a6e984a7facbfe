"""The sentences of the studies say what the records say."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from selfflow.analysis.judge import recorded_differences
from selfflow.intervals import compare_seeds

ROOT = Path(__file__).parent.parent


def recorded(name):
    return json.loads((ROOT / f"data/results/{name}.json").read_text())


def prose(study):
    "The markdown of a study, with single spaces."
    book = json.loads((ROOT / f"nbs/studies/{study}.ipynb").read_text())
    texts = [
        "".join(cell["source"])
        for cell in book["cells"]
        if cell["cell_type"] == "markdown"
    ]
    return " ".join(" ".join(texts).split())


def differences(record, part=None):
    "Intervals of Self-Flow minus flow matching, {(CFG, factor): (gap, low, high)}."
    rows = recorded(record)
    rows = rows[part]["rows"] if part else rows["rows"]
    table = recorded_differences(rows, "flow matching", "Self-Flow")
    texts = table["difference, points (95 %)"].str.extract(
        r"([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\)"
    )
    return {key: tuple(map(float, row)) for key, row in texts.T.items()}


CLAIMS = [  # study, record, part, guidance, factor; the sign of the claim
    ("train_image", "train_image", "emblems", 1.0, "kind", 1),
    ("train_image", "train_image", "emblems", 1.0, "place", 1),
    ("train_image", "train_image", "emblems", 2.0, "kind", 1),
    ("train_image", "train_image", "emblems, seed 1", 1.0, "kind", 1),
    ("train_image", "train_image", "emblems, seed 1", 2.0, "kind", 1),
    ("train_image", "train_image", "emblems, cooled down", 1.0, "kind", 1),
    ("train_image", "train_image", "emblems, cooled down", 2.0, "kind", 1),
    ("train_image", "train_image", "emblems, cooled down", 3.0, "kind", 1),
    ("train_image", "train_image", "emblems, cooled down", 3.0, "colour", -1),
    ("train_image", "train_image", "emblems, cooled down", 3.0, "ground", -1),
    ("train_image", "train_image", "shapes, cooled down", 3.0, "kind", 1),
    ("train_video", "train_video", None, 8.0, "direction, tracked", 1),
    ("train_video", "train_video_gpu", None, 1.0, "direction, tracked", 1),
    ("train_video", "train_video_gpu", None, 3.0, "direction, tracked", 1),
    ("train_video", "train_video_gpu", None, 8.0, "direction, tracked", 1),
    ("train_video", "train_video_gpu", None, 8.0, "direction", 1),
]


@pytest.mark.parametrize("study, record, part, cfg, factor, sign", CLAIMS)
def test_a_difference_that_is_claimed_excludes_zero_and_is_the_recorded_one(
    study, record, part, cfg, factor, sign
):
    gap, *ends = (sign * end for end in differences(record, part)[cfg, factor])
    low, high = sorted(ends)
    assert low > 0
    text = prose(study)
    assert f"{gap:.1f}" in text
    assert f"({low:.1f} to {high:.1f}" in text.replace("(95 % interval ", "(")


def test_a_difference_that_is_not_claimed_includes_zero():
    "By the judge, the models of train_video differ at no guidance."
    gaps = differences("train_video")
    for cfg in (1.0, 3.0, 8.0):
        _, low, high = gaps[cfg, "direction"]
        assert low < 0 < high
    assert "{:.1f} points ({:+.1f} to {:+.1f})".format(
        *gaps[8.0, "direction"]
    ) in prose("train_video")


def test_the_scenes_of_train_joint_are_the_recorded_ones():
    for row in recorded("train_joint")["findings"]:
        assert row["difference"] in prose("train_joint")


@pytest.mark.parametrize(
    "first, second, claimed",
    [
        ("schedule only", "Self-Flow", False),
        ("Self-Flow", "Self-Flow, centred target", False),
        ("Self-Flow", "Self-Flow, separated", True),
        ("Self-Flow", "Self-Flow, diffusion forcing", True),
    ],
)
def test_the_losses_of_the_rivals_are_the_recorded_ones(first, second, claimed):
    table = pd.DataFrame(recorded("rivals")["rows"])
    values = {
        arm: dict(zip(rows["seed"], rows["flow loss"], strict=True))
        for arm, rows in table.groupby("arm")
    }
    comparison = compare_seeds(values[first], values[second])
    assert comparison.significant == claimed
    low, high = comparison.interval
    interval = (low, high) if not claimed else sorted((abs(low), abs(high)))
    numbers = [f"{end:+.4f}" if not claimed else f"{end:.4f}" for end in interval]
    assert all(number in prose("rivals") for number in numbers)


def test_the_cost_of_closed_attention_grows_as_the_record_says():
    rows = [
        row
        for row in recorded("attention")["closing_emblems"]
        if (row["model"], row["tokens"]) == ("Self-Flow", "noisier")
    ]
    first, last = (
        100 * row["difference"] / row["full"] for row in rows[:: len(rows) - 1]
    )
    assert f"from {first:.0f} % of their error" in prose("attention")
    assert f"to {last:.0f} % at the widest" in prose("attention")


def outputs(study):
    "The text of the stored outputs of a study."
    book = json.loads((ROOT / f"nbs/studies/{study}.ipynb").read_text())
    texts = []
    for cell in book["cells"]:
        for output in cell.get("outputs", []):
            texts += [
                *output.get("text", []),
                *output.get("data", {}).get("text/plain", []),
            ]
    return "".join(texts)


@pytest.mark.parametrize(
    "study, interval",
    [
        ("own_data", "+1.3% (95 % -1.4% to +4.0%)"),
        ("train_audio", "-22.1 (-27.5 to -17.1)"),
        ("train_audio", "-3.3 (-5.8 to -1.2)"),
        ("train_audio", "-67.9 (-73.8 to -61.2)"),
        ("train_joint", "-5.0 (-8.5 to -0.9)"),
    ],
)
def test_an_interval_in_a_sentence_is_that_of_an_output(study, interval):
    assert interval in outputs(study)
    numbers = re.findall(r"\d+\.\d", interval)
    assert all(number in prose(study) for number in numbers)
