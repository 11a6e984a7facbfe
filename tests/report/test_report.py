"""Figures are pure, a report is one safe file that names what is missing, and each
mistake on the command line is explained.
"""

import inspect
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from browser import CHROMIUM, FLAGS, playwright
from matplotlib.figure import Figure
from matplotlib.text import Text
from safetensors.torch import load_file, save_file

from selfflow.analysis import probing
from selfflow.analysis.comparison import arms, config_table, over_seeds
from selfflow.analysis.probe_records import read_probes, write_probes
from selfflow.analysis.probing import probe_run
from selfflow.analysis.sample_metrics import run_metrics
from selfflow.cli import main
from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources
from selfflow.figures import plots
from selfflow.figures.layers import draw_score_maps
from selfflow.intervals import proportion_interval
from selfflow.method.options import (
    FeatureOptions,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    TransformerOptions,
)
from selfflow.options import read_features
from selfflow.registries import Named
from selfflow.report import report, representation_sections, sample_sections
from selfflow.report.document import Report, Section, write_pdf
from selfflow.report.probe_sections import probe_section
from selfflow.report.report import (
    SECTIONS,
    _summary,
    make_missing,
    missing_parts,
    run_report,
)
from selfflow.report.run_sections import loss_section, run_section
from selfflow.report.sample_sections import compare_shares, plane_section
from selfflow.training.config import Config, TrainConfig
from selfflow.training.loop import train
from selfflow.training.run import Run
from selfflow.training.samples import write_samples

EVIL = "<img src=x onerror=alert(1)>"
QUICK = (run_section, probe_section)


def some(*shape):
    return np.random.default_rng(len(shape)).random(shape)


# figures


LOG = {"step": np.arange(9), "flow_loss": some(9)}
FIGURES = {
    "images": lambda: plots.draw_images(
        torch.ones(7, 1, 8, 8, requires_grad=True), titles=range(7), columns=3
    ),
    "colour images": lambda: plots.draw_images(some(1, 3, 8, 8)),
    "maps": lambda: plots.draw_maps(some(3, 4, 4), list("abc")),
    "views": lambda: plots.draw_views(
        some(2, 1, 8, 8), some(2, 4, 4), *some(2, 2, 3, 8, 8)
    ),
    "one view": lambda: plots.draw_views(
        some(1, 1, 8, 8), some(1, 4, 4), *some(2, 1, 1, 8, 8)
    ),
    "curves": lambda: plots.draw_curves(
        {"a": some(5), "b": (some(5),) * 3}, range(5), "x", "y", log=True
    ),
    "runs": lambda: plots.draw_runs(
        {
            "a": (np.arange(60), some(60)),
            "b": (np.arange(3), some(3)),
            "none": ((), ()),
        },
        "x",
        "y",
    ),
    "training": lambda: plots.draw_training(
        {"a": LOG, "b": {**LOG, "cosine": some(9), "constant_cosine": some(9)}}
    ),
    "loss by level": lambda: plots.draw_loss_by_level(
        [0.1, 0.9], {"a": some(2, 30), "b": some(2, 30)}
    ),
    "loss of one run": lambda: plots.draw_loss_by_level([0.1, 0.9], {"a": some(2, 30)}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_depend_only_on_their_data(name):
    sys.modules.pop("matplotlib.pyplot", None)
    figure = FIGURES[name]()
    second = FIGURES[name]()
    assert isinstance(figure, Figure)
    assert figure.axes
    assert plots.to_png(figure).startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")
    # equal data give equal images
    assert plots.to_png(FIGURES[name]()) == plots.to_png(second)
    # figures are drawn on any thread, which pyplot does not allow
    assert "matplotlib.pyplot" not in sys.modules


def test_a_score_map_shows_its_numbers_and_marks_significant_differences():
    accuracy = np.array([[0.5, 0.75], [0.25, 1.0]])
    gain = accuracy - 0.5
    differences = {"class": np.stack([gain, gain - 0.3, gain + 0.2])}
    maps = {"class": {"a": accuracy}}
    scores, gaps = draw_score_maps(maps, (1, 2), (0, 0.5), differences).axes
    assert [text.get_text() for text in scores.texts] == ["50", "75", "25", "100"]
    assert [text.get_text() for text in gaps.texts] == ["+0", "+25", "-25", "+50"]
    weights = [text.get_weight() for text in gaps.texts]
    assert weights == ["normal", "normal", "bold", "bold"]


def test_an_r2_is_written_without_its_leading_zero_only():
    scores = np.array([[0.75, -0.5], [-10.25, 1.0]])
    maps = {"size": {"a": scores}}
    figure = draw_score_maps(maps, (1, 2), (0, 0.5), measures={"size": "R^2"})
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == [".75", "-.50", "-10.25", "1.00"]


def test_many_curves_all_look_different():
    curves = {f"run {i}": some(5) + i for i in range(12)}
    lines = plots.draw_curves(curves, range(5), "x", "y").axes[0].lines
    styles = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(lines) == len(styles) == 12


def test_runs_without_a_log_are_left_out_of_the_training_curves():
    logs = {f"run {i}": LOG for i in range(7)}
    logs |= {"empty": {"step": []}, "none": pd.DataFrame()}
    assert len(plots.draw_training(logs).axes[0].lines) == 7


@pytest.mark.parametrize(
    ("furthest", "label", "factor"),
    [
        (150, "time, min", 60),
        (119, "time, s", 1),
        (7200, "time, h", 3600),
        (0.5, "time, s", 1),
    ],
)
def test_curves_of_runs_use_the_largest_unit_that_fits(furthest, label, factor):
    x = np.linspace(furthest / 10, furthest, 10)
    y = some(10)
    units = ((1, "s"), (60, "min"), (3600, "h"))
    axis = plots.draw_runs({"a": (x, y)}, "time", "y", units).axes[0]
    assert axis.get_xlabel() == label
    drawn = axis.lines[-1].get_xydata()
    np.testing.assert_allclose(drawn, np.stack([x / factor, y], 1))


def test_running_means_do_not_lag_and_names_do_not_overlap():
    x = np.arange(1, 101.0)
    curves = {f"run {i}": (x, 2 * x + 0.1 * i) for i in range(8)}
    curves["low"] = (x[:50], x[:50])
    figure = plots.draw_runs(curves, "step", "y")
    axis = figure.axes[0]
    means = axis.lines[1:16:2]  # after each curve comes its mean
    for line in means:
        offset = line.get_ydata() - 2 * line.get_xdata()
        np.testing.assert_allclose(offset, offset[0], atol=1e-9)
    in_order_of_ends = ["low", *(f"run {i}" for i in range(8))]
    assert [text.get_text() for text in axis.texts] == in_order_of_ends
    figure.canvas.draw()
    top = axis.get_window_extent().height
    heights = np.array([text.xyann[1] for text in axis.texts]) * top
    # the height of the text alone, without the line to the end of its curve
    tallest = max(Text.get_window_extent(text).height for text in axis.texts)
    assert (np.diff(heights) >= tallest).all()
    assert heights[-1] <= top
    with pytest.raises(ValueError, match="no curve to draw"):
        plots.draw_runs({"a": ((), ())}, "x", "y")


def test_images_with_two_channels_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 2, 8, 8\), expected"):
        plots.draw_images(np.zeros((2, 2, 8, 8)))


# documents


def tags_of(page):
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, pairs: tags.append((tag, dict(pairs)))
    parser.feed(page)
    return tags


def test_a_report_escapes_everything_and_loads_nothing(tmp_path):
    report = Report(EVIL).heading(EVIL).text(EVIL).missing(EVIL, EVIL).lines([EVIL])
    report.table(pd.DataFrame({EVIL: [EVIL]}), EVIL)
    report.table(pd.DataFrame({"a": [1]}), EVIL, folded=True)
    report.figure(FIGURES["maps"](), EVIL + '"')
    report.section(Section(EVIL, EVIL).find(EVIL).limits(EVIL))
    report.contents().media("audio/wav", b"RIFF", EVIL)
    page = report.write(tmp_path / "deep" / 'a "b" & c.html').read_text()
    assert EVIL not in page
    assert page.count("&lt;img") >= 18
    assert "http" not in page
    tags = tags_of(page)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in tags}
    folder = "a%20%22b%22%20%26%20c_files/0"
    allowed = ("data:image/png;", "data:audio/wav;", "#part-", folder)
    for _, attributes in tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith(allowed)


def test_tables_and_numbers_are_written_with_all_digits(tmp_path):
    losses = [1 / 3, float("nan")]
    table = pd.DataFrame({"run": ["a", "b"], "loss": losses, "steps": [7, 8]})
    section = Section("Losses").table(table, "Flow loss: by run").text("words")
    path = Report("Two").section(section).write(tmp_path / "two.html")
    page = path.read_text()
    assert "0.3333<" in page
    assert ">-<" in page
    csv = "01-flow-loss-by-run.csv"
    assert pd.read_csv(tmp_path / "two_files" / csv)["loss"][0] == 1 / 3
    numbers = json.loads((tmp_path / "two_files/report.json").read_text())
    part = numbers["parts"][1]
    assert part["rows"] == [["a", 1 / 3, 7], ["b", None, 8]]
    assert part["file"] == csv


def test_a_new_report_removes_the_tables_of_the_old_one(tmp_path):
    path = tmp_path / "one.html"
    Report("One").table(pd.DataFrame({"a": [1]}), "numbers").write(path)
    Report("One").write(path)
    files = [file.name for file in (tmp_path / "one_files").iterdir()]
    assert files == ["report.json"]


# reports of runs


def test_a_report_shows_what_exists_and_names_what_is_missing(runs):
    pair = {"A": runs["tiny"], "B": runs["vanilla"]}
    page = run_report(pair, Report("Two").text("First <words>."), QUICK).html()
    assert "objective.name" in page
    assert "First &lt;words&gt;." in page
    assert "A has no probes yet" in page
    assert "Missing or outdated results in: Linear probes." in page
    with pytest.raises(ValueError, match="at least one run"):
        run_report({})


def test_the_settings_of_a_run_are_complete_and_only_differences_are_compared(runs):
    single = config_table({"A": runs["tiny"]})
    parts = (
        DataConfig,
        ModelConfig.of("transformer"),
        ObjectiveConfig.of("self_flow"),
        TrainConfig,
        LoraConfig,
    )
    count = 3 + sum(len(fields(part)) for part in parts)  # name, seed, defaults
    assert len(single) == count > 40
    assert single.set_index("setting").loc["training.steps", "A"] == 12
    differences = config_table({"A": runs["tiny"], "B": runs["vanilla"]})
    assert set(differences["setting"]) == {"name", "objective.name"}


def with_seed(run, path, seed):
    """A copy of a run whose config names another seed."""
    shutil.copytree(run.path, path)
    stored = json.loads((path / "config.json").read_text())
    stored["config"]["seed"] = seed
    (path / "config.json").write_text(json.dumps(stored))
    return Run.open(path)


def test_seeds_are_compared_only_if_there_are_several(runs, tmp_path):
    many = {}
    for name in ("tiny", "vanilla"):
        for seed in (0, 1):
            path = tmp_path / f"{name}{seed}"
            many[f"{name} {seed}"] = with_seed(runs[name], path, seed)
    tiny, vanilla = (list(arm.values()) for arm in arms(many))
    assert tiny == ["tiny 0", "tiny 1"]
    assert vanilla == ["vanilla 0", "vanilla 1"]
    values = {"tiny 0": 1.0, "tiny 1": 1.1, "vanilla 0": 2.0, "vanilla 1": 2.2}
    (difference,) = over_seeds(many, values)
    assert difference.difference == pytest.approx(1.05)
    assert "2 training seeds, paired" in str(difference)
    assert over_seeds(many, {"tiny 0": 1.0, "vanilla 0": 2.0}) == []
    summary = _summary(many, [])
    assert "4 runs" in summary[0]
    assert "2 training seeds each" in summary[0]
    assert not any("one training seed" in line for line in summary)
    few = {name: many[name] for name in ("tiny 0", "vanilla 0")}
    assert any("one training seed" in line for line in _summary(few, []))


def test_a_run_shows_no_significant_difference_from_itself(runs):
    (finding,) = loss_section({"A": runs["tiny"], "again": runs["tiny"]}).findings
    interval = "+0 (95 % -0.117 to +0.117, over 64 validation samples"
    assert f"again minus A: {interval}" in finding
    assert "a significant difference" not in finding


def test_the_difference_of_shares_has_the_published_interval():
    """Newcombe 1998, table II: 56/70 and 48/80, method 10: 0.0524 to 0.3339."""

    def share(correct, count):
        interval = proportion_interval(np.arange(count) < correct)
        return {"value": correct / count, "interval": interval, "count": count}

    difference = compare_shares(share(48, 80), share(56, 70), ("a", "b"))
    assert difference.interval == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_damaged_files_are_reported_and_the_rest_of_the_report_is_made(runs, tmp_path):
    shutil.copytree(runs["tiny"].path, tmp_path / "run")
    for name in ("probes.json", "metrics.json", "judged.json"):
        (tmp_path / "run" / name).write_text("{not json")
    (tmp_path / "run/samples").mkdir(exist_ok=True)
    (tmp_path / "run/samples/broken.safetensors").write_text("nothing")
    sections = [section for section in SECTIONS if section is not plane_section]
    page = run_report({"run": Run.open(tmp_path / "run")}, sections=sections).html()
    assert "probes.json cannot be used" in page
    assert "broken.safetensors cannot be read" in page
    for title in (
        "Flow loss by noise level",
        "Curves by layer",
        "Student and teacher",
        "Attention",
        "Sample metrics",
    ):
        assert f">{title}</h2>" in page


def test_a_report_includes_video_and_audio(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_sections, "_METHOD", "PCA")
    monkeypatch.setattr(representation_sections, "_FITTED", 16)
    monkeypatch.setattr(representation_sections, "_SCORED", 16)
    monkeypatch.setattr(representation_sections, "_MASS_SAMPLES", 4)
    all_items = representation_sections.items_of
    monkeypatch.setattr(
        representation_sections,
        "items_of",
        lambda run, split, count: all_items(run, split, 12),
    )
    training = TrainConfig(
        steps=1, batch=4, validate_every=1, validation=4, sample_every=0
    )
    model = ModelConfig(width=16, depth=2, heads=2)
    data = DataConfig("scenes")
    config = Config(name="scenes", data=data, model=model, training=training)
    page = run_report({"scenes": train(config, tmp_path)}).html()
    assert "could not be made" not in page
    assert "tokens of the video" in page
    assert page.count("data:image/png") >= 8


def test_missing_parts_are_listed_with_their_cost_and_made(
    runs, tmp_path, capsys, monkeypatch
):
    shutil.copytree(runs["tiny"].path, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    parts = missing_parts({"run": run})
    assert all(part.cost for part in parts)
    names = {part.name.split(" of ")[0] for part in parts}
    assert names == {"probes", "samples", "metrics"}

    def refuse(run):
        raise ValueError("there is nothing")

    monkeypatch.setattr(report, "_write_probes", refuse)
    monkeypatch.setattr(report, "_write_samples", lambda run: None)
    monkeypatch.setattr(report, "_write_metrics", lambda run: None)
    assert make_missing({"run": run}) == ["probes of run: there is nothing"]
    output = capsys.readouterr().out
    assert output.index("to make: metrics of run") < output.index("not made")
    assert "samples through the model" in output


def test_nothing_is_missing_after_the_missing_parts_are_made(
    runs, tmp_path, monkeypatch
):
    counts = {"train": 60, "validation": 30, "test": 40}
    probes = partial(probe_run, levels=(0.5,), layers=(1,), counts=counts)
    monkeypatch.setattr(report, "probe_run", probes)
    monkeypatch.setattr(report, "write_samples", partial(write_samples, steps=1))
    monkeypatch.setattr(report, "run_metrics", partial(run_metrics, count=20, steps=1))
    shutil.copytree(runs["tiny"].path, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert make_missing({"run": run}) == [] == missing_parts({"run": run})


def test_equal_counts_of_several_runs_are_written_once():
    assert report._each([1], "seed") == "1 seed"
    assert report._each([2, 2], "seed") == "2 seeds each"
    assert report._each([2, 3], "seed") == "2/3 seeds"


def test_a_pdf_without_a_browser_is_refused_before_any_work(
    runs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", str(tmp_path))
    page = tmp_path / "r.html"
    with pytest.raises(SystemExit):
        main(["report", str(runs["tiny"].path), "--output", str(page), "--pdf"])
    assert "neither is on the path" in capsys.readouterr().err
    assert not page.exists()


def assert_page_works_offline(tab, page, width):
    """The page opens offline, fits the screen, and its images and links work."""
    messages = []
    requests = []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.on("dialog", lambda dialog: (messages.append("a dialog"), dialog.dismiss()))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(page.as_uri())
    assert messages == []
    assert requests[0] == page.as_uri()
    assert all(url.startswith("data:") for url in requests[1:])
    # only tables and figures scroll sideways
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("[...document.images].every(image => image.naturalWidth > 50)")
    for link in tab.locator("nav a").all():
        assert tab.locator(link.get_attribute("href")).count() == 1


def test_a_report_opens_in_a_browser_without_a_network(runs, tmp_path, monkeypatch):
    api = playwright()
    monkeypatch.setattr(sample_sections, "_METHOD", "PCA")
    first, second = (
        probed(runs[name], tmp_path / name)[0] for name in ("tiny", "vanilla")
    )
    share = {"share": 0.5, "interval": [0.4, 0.6], "count": 100}
    share |= {"own": 0.9, "chance": 0.1}
    record = {"recipe": {"step": 12, EVIL: EVIL}, "factors": {EVIL: share}}
    for run in (first, second):
        (run.path / "judged.json").write_text(json.dumps(record))
    write_samples(first, torch.tensor([1, 2]), steps=2)
    document = run_report({EVIL: first, "B": second})
    assert "could not be made" not in document.html()
    assert any("Probe of the class" in line for line in document.parts[1]["lines"])
    page = document.write(tmp_path / "out" / "report.html")
    with api.sync_playwright() as browsers:
        window = browsers.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for scheme, width in (("light", 1000), ("dark", 390)):
            tab = window.new_page(
                color_scheme=scheme,
                viewport={"width": width, "height": 800},
                offline=True,
            )
            assert_page_works_offline(tab, page, width)
            assert tab.locator("h1").inner_text() == f"{EVIL} and B"
        window.close()
    assert write_pdf(page).read_bytes()[:5] == b"%PDF-"


def probed(run, path, **options):
    """A copy of a run with a few probes in its folder."""
    shutil.copytree(run.path, path)
    run = Run.open(path)
    levels = (0.0, 0.5)
    probes = probe_run(
        run, levels, families=("regression",), strengths=(0.1,), **options
    )
    return run, write_probes(run, probes)


def test_a_report_compares_probes_and_flags_old_ones(runs, tmp_path):
    first, _ = probed(runs["tiny"], tmp_path / "tiny")
    second, _ = probed(runs["vanilla"], tmp_path / "vanilla")
    pair = {"A": first, "B": second}
    page = run_report(pair, sections=QUICK).html()
    assert "B minus A" in page
    assert "raw input" in page
    assert "untrained network" in page
    assert "not of its newest" not in page
    stored = read_probes(first)
    write_probes(first, replace(stored, about={**stored.about, "step": 4}))
    page = run_report(pair, sections=QUICK).html()
    assert "The probes of A are of step 4, not of its newest checkpoint" in page


def test_probes_of_different_layers_are_shown_without_a_difference(runs, tmp_path):
    first, _ = probed(runs["tiny"], tmp_path / "a")
    second, _ = probed(runs["vanilla"], tmp_path / "b", layers=(1, 4))
    page = run_report({"A": first, "B": second}, sections=QUICK).html()
    # two figures, each with the text in its alternative text and its caption
    assert page.count("Test score by block and noise level.") == 4
    assert "Right: " not in page


# samples


def test_samples_are_stored_with_their_run(runs):
    run = runs["vanilla"]
    labels = torch.tensor([1, 2, 3])
    images, file = write_samples(run, labels, steps=3, seed=5)
    stored = load_file(file)
    assert torch.equal(stored["images"], images)
    assert stored["labels"].tolist() == [1, 2, 3]
    assert torch.equal(images, run.sample(labels, steps=3, seed=5)["image"])
    assert not torch.equal(images, run.sample(labels, steps=3, seed=6)["image"])
    assert file.parent == run.path / "samples"
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_new_samples_never_replace_stored_ones(runs):
    run = runs["vanilla"]
    _, file = write_samples(run, torch.tensor([1, 2, 3]), steps=3, seed=5)
    before = file.read_bytes()
    new_files = set()
    for labels, seed in (([1, 2, 4], 5), ([1, 2], 5), ([1, 2, 3], 6)):
        new_files.add(write_samples(run, torch.tensor(labels), steps=3, seed=seed)[1])
    assert len(new_files | {file}) == 4
    assert file.read_bytes() == before


def test_samples_do_not_depend_on_the_batch_size(runs):
    labels = torch.arange(10)
    torch.testing.assert_close(
        runs["tiny"].sample(labels, steps=3, batch=3),
        runs["tiny"].sample(labels, steps=3),
    )


# commands


@pytest.mark.parametrize(
    "args, words",
    [
        (["train", "--objective.mask-ratio", "0.7"], "mask_ratio is 0.7"),
        (["train", "--objective.name", "selfflow"], "Did you mean 'self_flow'"),
        (
            [
                "train",
                "--objective.student-layer",
                "5",
                "--objective.teacher-layer",
                "3",
            ],
            "student_layer 5",
        ),
        (["train", "--data.patch", "3"], "not divisible by patch 3"),
        (
            ["train", "--name", "tiny", "--seed", "7"],
            "seed: 0 in the folder, 7 requested",
        ),
        (["sample", "nowhere"], "holds no run"),
        (["sample", "tiny", "--labels", "10"], "no class 10: labels run from 0 to 9"),
        (["train", "--model.mlp-ratio", "-1"], "mlp_ratio is -1.0"),
        (["train", "--model.mlp-ratio", "nan"], "mlp_ratio is nan"),
        (["train", "--device", "meta"], "device 'meta' cannot be used here"),
        (["train", "--name", "a/b"], "'a/b' is not a valid run name"),
        (["sample", "tiny", "--steps", "0"], "steps is 0"),
        (["sample", "tiny", "--shift", "0"], "shift"),
        (
            ["sample", "tiny", "--interval", "0.5", "0.2", "--cfg-scale", "2"],
            "interval is (0.5, 0.2)",
        ),
        (["train", "--objective.name", "repa"], "needs features of an encoder"),
        (
            ["train", "--objective.name", "repa", "--features", "nowhere.safetensors"],
            "nowhere.safetensors",
        ),
        (
            ["train", "--features", "tiny/config.json"],
            "tiny/config.json is no safetensors file",
        ),
        (["train", "--features", "tiny"], "tiny is a folder, not a safetensors file"),
        (
            ["train", "--data.name", "folder", "--data.path", ".", "--data.rate", "0"],
            "data.rate is 0, expected 1000 to 400000",
        ),
        (
            ["train", "--features", "tiny/checkpoints/step-00000012/model.safetensors"],
            "has no tensor 'features', only",
        ),
        (["train", "--objective.schedule", "duel"], "'dual'"),
        (["train", "--objective.block", "3"], "block 3 does not divide grid (4, 4)"),
        (
            ["train", "--objective.name", "sra", "--objective.flow-tokens", "masked"],
            "with one level no token is",
        ),
        (["sample", "tiny", "--each", "0"], "each is 0"),
        (["sample", "tiny", "--cfg-scale", "nan"], "cfg_scale is nan"),
        (
            ["sample", "tiny", "--device", "gpu"],
            "selfflow: device 'gpu' cannot be used here",
        ),
        (["sample", "tiny", "--method", "rk4"], "known are euler, heun"),
        (["probe", "nowhere"], "holds no run"),
        (["report", "nowhere"], "holds no run"),
        (["notebook", "no.ipynb", "out.ipynb"], "there is no notebook"),
    ],
)
def test_mistakes_are_explained(runs, monkeypatch, capsys, args, words):
    folder = runs["tiny"].path.parent
    monkeypatch.chdir(folder)
    extra = ["--folder", "."] if args[0] == "train" else []
    with pytest.raises(SystemExit) as stop:
        main(args + extra)
    captured = capsys.readouterr()
    output = " ".join((captured.err + captured.out).split())
    assert stop.value.code == 2
    assert words in output
    assert "Traceback" not in output
    folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert folders == ["tiny", "vanilla"], "no folder was made"


def test_the_command_line_trains_samples_and_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample_sections, "_METHOD", "PCA")
    run = tmp_path / "cli"
    train_command = (
        f"train --name cli --folder {tmp_path} --model.width 16 --model.depth 4 "
        "--model.heads 2 --training.steps 3 --training.batch 8 "
        "--objective.name flow_matching"
    ).split()
    main(train_command)
    main(f"sample {run} --labels 3 --each 2 --steps 2 --cfg-scale 2".split())
    main(["report", str(run), "--output", str(tmp_path / "r.html")])
    sheets = run.glob("samples/step-3-euler-2-cfg-2-seed-0-2-labels-*.png")
    assert len(list(sheets)) == 1
    assert (tmp_path / "r.html").exists()
    assert "3 steps" in capsys.readouterr().out
    (run / "log.jsonl").unlink()  # neither training nor the report needs it
    main(train_command)
    main(["report", str(run)])


def test_the_command_line_passes_features_to_repa(tmp_path, capsys):
    sources = Sources(Config().data)
    tokens = sources.take("digits", torch.arange(len(sources.data["digits"]))).x0
    pooled = tmp_path / "pooled.safetensors"
    short = tmp_path / "short.safetensors"
    save_file({"features": tokens.mean(1), "other": tokens}, pooled)
    save_file({"features": tokens[1:]}, short)
    assert torch.equal(read_features(pooled), tokens.mean(1))
    command = (
        f"train --name repa --folder {tmp_path / 'runs'} --model.width 16 "
        "--model.depth 2 --model.heads 2 --training.steps 2 --training.batch 8 "
        "--objective.name repa --features"
    ).split()
    with pytest.raises(SystemExit):
        main([*command, str(short)])
    assert "features of 1077 samples, but 1078" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    main([*command, str(pooled)])
    run = Run.open(tmp_path / "runs/repa")
    assert run.state()["step"] == 2
    assert run.log["rep_loss"].notna().all()
    assert run.load("objective")["projector.4.weight"].shape == (4, 2048)


def test_the_command_line_uses_all_options_of_sampling(runs, tmp_path):
    shutil.copytree(runs["tiny"].path, tmp_path / "tiny")
    main(
        (
            f"sample {tmp_path / 'tiny'} --labels 3 5 --each 2 --steps 3 --method sde "
            "--seed 4 --cfg-scale 1.5 --shift 2.5 --interval 0.1 0.7"
        ).split()
    )
    (file,) = (tmp_path / "tiny/samples").glob("*.safetensors")
    settings = "step-12-sde-3-shift-2.5-cfg-1.5-in-0.1-0.7-seed-4-4-labels-"
    assert file.name.startswith(settings)
    labels = torch.tensor([3, 3, 5, 5])
    expected = runs["tiny"].sample(
        labels, 3, "sde", 1.5, 4, shift=2.5, interval=(0.1, 0.7)
    )
    assert torch.equal(load_file(file)["images"], expected["image"])


def test_the_command_line_probes_a_run(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probing, "WIDE_STRENGTHS", (0.1,))
    shutil.copytree(runs["tiny"].path, tmp_path / "tiny")
    main(["probe", str(tmp_path / "tiny"), "--samples", "60"])
    output = capsys.readouterr().out
    assert "raw input" in output
    assert "untrained network" in output
    assert "tiny, block" in output
    record = json.loads((tmp_path / "tiny/probes.json").read_text())
    assert record["about"]["levels"] == [0.0, 0.1, 0.25, 0.5, 0.75]


def notebook_with(path, code):
    nbformat = pytest.importorskip("nbformat")
    cells = [nbformat.v4.new_code_cell(code)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return nbformat


def test_a_notebook_runs_without_a_screen_and_stores_no_progress(tmp_path, capfd):
    code = (
        "from tqdm.auto import tqdm\n"
        "for _ in tqdm(range(3), desc='counting'): pass\n"
        "print('done', 6 * 7)"
    )
    nbformat = notebook_with(tmp_path / "in.ipynb", code)
    result = tmp_path / "out" / "out.ipynb"
    main(["notebook", str(tmp_path / "in.ipynb"), str(result)])
    (cell,) = nbformat.read(result, 4).cells
    assert [output.text for output in cell.outputs] == ["done 42\n"]
    assert "counting: 100%" in capfd.readouterr().err


def test_a_failing_notebook_stores_its_output_up_to_the_failure(tmp_path, capfd):
    code = "print('before')\nraise RuntimeError('in the cell')"
    notebook_with(tmp_path / "bad.ipynb", code)
    with pytest.raises(SystemExit):
        main(["notebook", str(tmp_path / "bad.ipynb"), str(tmp_path / "out.ipynb")])
    assert "in the cell" in capfd.readouterr().err
    assert "before" in (tmp_path / "out.ipynb").read_text()


def words_of(text):
    return " ".join(re.findall(r"\w+", text))


def help_of(options):
    "The comment of each field, next to it or above it."
    explained = {}
    above = []
    for line in inspect.getsource(options).splitlines():
        if comment := re.match(r"    # (.+)$", line):
            above.append(comment[1])
            continue
        if field := re.match(r"    (\w+): [^#]+(?:  # (.+))?$", line):
            explained[field[1]] = field[2] or " ".join(above)
        above = []
    return {name: text for name, text in explained.items() if text}


def test_the_installed_command_has_help_for_every_field():
    command = Path(sys.executable).with_name("selfflow")
    done = subprocess.run(
        [command, "train", "--help"], capture_output=True, text=True, check=True
    )
    printed = words_of(done.stdout)
    for options in (
        Config,
        DataConfig,
        ModelConfig,
        TransformerOptions,
        ObjectiveConfig,
        FeatureOptions,
        TrainConfig,
    ):
        explained = help_of(options)
        assert explained
        for name, text in explained.items():
            if isinstance(options, Named) and name == "name":
                text = f"one of {', '.join(options.registry)}"
            assert words_of(name.replace("_", "-")) in printed, name
            assert words_of(text) in printed, name
