"""Figures without pyplot, reports in one escaped file, commands that say what went wrong."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
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

from selfflow.analysis.comparison import arms, config_table, over_seeds
from selfflow.analysis.probing import probe_run, read_probes, write_probes
from selfflow.cli import main
from selfflow.data.options import DataConfig
from selfflow.data.sources import Sources
from selfflow.figures import plots
from selfflow.figures.layers import draw_score_maps
from selfflow.intervals import proportion_interval
from selfflow.method.options import (
    FeatureOptions,
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
def test_figures_are_pure(name):
    sys.modules.pop("matplotlib.pyplot", None)
    figure, again = FIGURES[name](), FIGURES[name]()
    assert isinstance(figure, Figure) and figure.axes
    assert (
        plots.to_png(figure)[:4] == b"\x89PNG" and figure._repr_png_()[:4] == b"\x89PNG"
    )
    assert plots.to_png(FIGURES[name]()) == plots.to_png(again), (
        "the same data gives the same picture"
    )
    assert "matplotlib.pyplot" not in sys.modules, (
        "no pyplot: figures are drawn on any thread"
    )


def test_a_heat_map_shows_the_numbers_it_is_given():
    accuracy = np.array([[0.5, 0.75], [0.25, 1.0]])
    gain = accuracy - 0.5
    gaps = np.stack([gain, gain - 0.3, gain + 0.2])
    figure = draw_score_maps(
        {"class": {"a": accuracy}}, (1, 2), (0, 0.5), {"class": gaps}
    )
    texts = [[t.get_text() for t in axis.texts] for axis in figure.axes]
    assert texts[0] == ["50", "75", "25", "100"] and texts[1] == [
        "+0",
        "+25",
        "-25",
        "+50",
    ]
    assert [t.get_weight() for t in figure.axes[1].texts] == [
        "normal",
        "normal",
        "bold",
        "bold",
    ]


def test_many_curves_are_all_drawn_and_all_different():
    figure = plots.draw_curves(
        {f"run {i}": some(5) + i for i in range(12)}, range(5), "x", "y"
    )
    lines = figure.axes[0].lines
    assert (
        len(lines)
        == 12
        == len({(line.get_color(), line.get_linestyle()) for line in lines})
    )
    logs = {f"run {i}": LOG for i in range(7)} | {"empty": {"step": []}}
    assert len(plots.draw_training(logs | {"none": pd.DataFrame()}).axes[0].lines) == 7


@pytest.mark.parametrize(
    "furthest, label, factor",
    [
        (150, "time, min", 60),
        (119, "time, s", 1),
        (7200, "time, h", 3600),
        (0.5, "time, s", 1),
    ],
)
def test_curves_of_runs_are_drawn_in_the_largest_unit_that_serves(
    furthest, label, factor
):
    x, y = np.linspace(furthest / 10, furthest, 10), some(10)
    figure = plots.draw_runs(
        {"a": (x, y)}, "time", "y", ((1, "s"), (60, "min"), (3600, "h"))
    )
    assert figure.axes[0].get_xlabel() == label
    np.testing.assert_allclose(
        figure.axes[0].lines[-1].get_xydata(), np.stack([x / factor, y], 1)
    )


def test_a_running_mean_does_not_lag_and_names_do_not_overlap():
    x = np.arange(1, 101.0)
    curves = {f"run {i}": (x, 2 * x + 0.1 * i) for i in range(8)} | {
        "low": (x[:50], x[:50])
    }
    figure = plots.draw_runs(curves, "step", "y")
    axis = figure.axes[0]
    for line in axis.lines[1:16:2]:  # the thick ones
        gaps = line.get_ydata() - 2 * line.get_xdata()
        np.testing.assert_allclose(gaps, gaps[0], atol=1e-9)
    assert [text.get_text() for text in axis.texts] == [
        "low",
        *(f"run {i}" for i in range(8)),
    ], "in the order of the ends"
    figure.canvas.draw()
    heights = (
        np.array([text.xyann[1] for text in axis.texts])
        * axis.get_window_extent().height
    )
    # without the line to the end of the curve
    tall = max(Text.get_window_extent(text).height for text in axis.texts)
    assert (np.diff(heights) >= tall).all() and heights[
        -1
    ] <= axis.get_window_extent().height
    with pytest.raises(ValueError, match="no curve to draw"):
        plots.draw_runs({"a": ((), ())}, "x", "y")


def test_images_of_another_form_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 2, 8, 8\), expected"):
        plots.draw_images(np.zeros((2, 2, 8, 8)))


def tags_of(page):
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(
        (tag, dict(attributes))
    )
    parser.feed(page)
    return tags


def test_reports_escape_everything_and_load_nothing(tmp_path):
    document = (
        Report(EVIL)
        .heading(EVIL)
        .text(EVIL)
        .table(pd.DataFrame({EVIL: [EVIL]}), EVIL)
        .missing(EVIL, EVIL)
        .lines([EVIL])
    )
    document.figure(FIGURES["maps"](), EVIL + '"').table(
        pd.DataFrame({"a": [1]}), EVIL, folded=True
    )
    document.section(Section(EVIL, EVIL).found(EVIL).limits(EVIL)).contents().media(
        "audio/wav", b"RIFF", EVIL
    )
    page = document.write(tmp_path / "deep" / 'a "b" & c.html').read_text()
    assert EVIL not in page and page.count("&lt;img") >= 18
    tags = tags_of(page)
    links = [
        value
        for _, attributes in tags
        for name, value in attributes.items()
        if name in ("src", "href")
    ]
    for link in links:
        assert link.startswith(
            (
                "data:image/png;",
                "data:audio/wav;",
                "#part-",
                "a%20%22b%22%20%26%20c_files/0",
            )
        )
    assert (
        not {"script", "link", "iframe"} & {tag for tag, _ in tags}
        and "http" not in page
    )
    assert not any(
        name.startswith("on") for _, attributes in tags for name in attributes
    )


def test_the_tables_of_a_page_lie_beside_it_with_all_digits(tmp_path):
    table = pd.DataFrame(
        {"run": ["a", "b"], "loss": [1 / 3, float("nan")], "steps": [7, 8]}
    )
    document = Report("Two").section(
        Section("Losses").table(table, "Flow loss: by run").text("words")
    )
    page = document.write(tmp_path / "two.html")
    kept = pd.read_csv(tmp_path / "two_files/01-flow-loss-by-run.csv")
    assert (
        kept["loss"][0] == 1 / 3
        and "0.3333<" in page.read_text()
        and ">-<" in page.read_text()
    )
    parts = json.loads((tmp_path / "two_files/report.json").read_text())["parts"]
    assert (
        parts[1]["rows"] == [["a", 1 / 3, 7], ["b", None, 8]]
        and parts[1]["file"] == "01-flow-loss-by-run.csv"
    )
    Report("Two").write(page)
    assert [path.name for path in (tmp_path / "two_files").iterdir()] == [
        "report.json"
    ], "nothing is left of the report before"


def test_a_report_of_runs_tells_what_is_there_and_what_is_not(runs, tmp_path):
    page = run_report(
        {"A": runs["tiny"], "B": runs["vanilla"]},
        Report("Two").text("First <words>."),
        QUICK,
    ).html()
    assert (
        "objective.name" in page
        and "First &lt;words&gt;." in page
        and "No probes of A yet" in page
    )
    assert "Something is missing, or out of date, in: Linear probes." in page
    single = config_table({"A": runs["tiny"]})
    parts = (
        DataConfig,
        ModelConfig.of("transformer"),
        ObjectiveConfig.of("self_flow"),
        TrainConfig,
    )
    count = 3 + sum(len(fields(part)) for part in parts)  # name, seed, defaults
    assert (
        len(single) == count > 40
        and single.set_index("setting").loc["training.steps", "A"] == 12
    )
    assert set(config_table({"A": runs["tiny"], "B": runs["vanilla"]})["setting"]) == {
        "name",
        "objective.name",
    }
    with pytest.raises(ValueError, match="at least one run"):
        run_report({})


def seeded(run, path, seed):
    "A copy of a run that says it had another seed."
    shutil.copytree(run.path, path)
    stored = json.loads((path / "config.json").read_text())
    stored["config"]["seed"] = seed
    (path / "config.json").write_text(json.dumps(stored))
    return Run.open(path)


def test_seeds_are_compared_only_where_there_are_several(runs, tmp_path):
    many = {
        f"{name} {seed}": seeded(runs[name], tmp_path / f"{name}{seed}", seed)
        for name in ("tiny", "vanilla")
        for seed in (0, 1)
    }
    assert [list(arm.values()) for arm in arms(many)] == [
        ["tiny 0", "tiny 1"],
        ["vanilla 0", "vanilla 1"],
    ]
    (pair,) = over_seeds(
        many, {"tiny 0": 1.0, "tiny 1": 1.1, "vanilla 0": 2.0, "vanilla 1": 2.2}
    )
    assert pair.difference == pytest.approx(1.05) and "2 training seeds, paired" in str(
        pair
    )
    assert over_seeds(many, {"tiny 0": 1.0, "vanilla 0": 2.0}) == []
    said = _summary(many, [])
    assert (
        "4 runs" in said[0]
        and "2/2 training seeds" in said[0]
        and not any("one training seed" in line for line in said)
    )
    few = {name: many[name] for name in ("tiny 0", "vanilla 0")}
    assert any("one training seed" in line for line in _summary(few, []))


def test_losses_of_a_run_and_itself_show_no_difference(runs):
    (found,) = loss_section({"A": runs["tiny"], "again": runs["tiny"]}).findings
    assert "no difference seen" in found and "again minus A: +0 (95 % -0.0" in found


def test_shares_of_other_samples_have_the_published_interval():
    "Newcombe 1998, table II: 56/70 and 48/80, method 10: 0.0524 to 0.3339."

    def wilson(k, n):
        return {
            "value": k / n,
            "interval": proportion_interval(np.arange(n) < k),
            "count": n,
        }

    pair = compare_shares(wilson(48, 80), wilson(56, 70), ("a", "b"))
    assert pair.interval == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_a_part_that_cannot_be_made_says_why_and_the_others_come(runs, tmp_path):
    shutil.copytree(runs["tiny"].path, tmp_path / "run")
    for name in ("probes.json", "metrics.json", "judged.json"):
        (tmp_path / "run" / name).write_text("{not json")
    (tmp_path / "run/samples").mkdir(exist_ok=True)
    (tmp_path / "run/samples/broken.safetensors").write_text("nothing")
    sections = [section for section in SECTIONS if section not in (plane_section,)]
    page = run_report({"run": Run.open(tmp_path / "run")}, sections=sections).html()
    assert "probes.json cannot be used" in page
    assert "broken.safetensors cannot be read" in page
    for title in (
        "Flow loss by level",
        "Curves by layer",
        "Student and teacher",
        "Attention",
        "Metrics of samples",
    ):
        assert f">{title}</h2>" in page


def test_sound_and_film_are_reported_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_sections, "_METHOD", "PCA")
    for module, name in (
        (representation_sections, "_FITTED"),
        (representation_sections, "_SCORED"),
    ):
        monkeypatch.setattr(module, name, 16)
    config = Config(
        name="scenes",
        data=DataConfig("scenes"),
        model=ModelConfig(width=16, depth=2, heads=2),
        training=TrainConfig(
            steps=1, batch=4, validate_every=1, validation=4, sample_every=0
        ),
    )
    monkeypatch.setattr(representation_sections, "_MASKED", 4)
    run = train(config, tmp_path)
    plain = representation_sections.items_of
    monkeypatch.setattr(
        representation_sections,
        "items_of",
        lambda run, split, count: plain(run, split, 12),
    )
    page = run_report({"scenes": run}).html()
    assert "could not be made" not in page
    assert "tokens of the video" in page and page.count("data:image/png") >= 8


def test_what_is_missing_is_named_with_its_cost_and_made(
    runs, tmp_path, capsys, monkeypatch
):
    shutil.copytree(runs["tiny"].path, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    whats = {
        what.split(" of ")[0] for what, cost, _ in missing_parts({"run": run}) if cost
    }
    assert whats == {"probes", "samples", "metrics"}
    for name in ("run_metrics", "_samples"):
        monkeypatch.setattr(report, name, lambda run: None)

    def refuse(run):
        raise ValueError("there is nothing")

    monkeypatch.setattr(report, "_probe", refuse)
    assert make_missing({"run": run}) == ["probes of run: there is nothing"]
    said = capsys.readouterr().out
    assert (
        said.index("to make: metrics of run") < said.index("not made")
        and "samples through the model" in said
    )


def test_a_pdf_without_a_browser_is_refused_before_work_is_done(
    runs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit):
        main(
            [
                "report",
                str(runs["tiny"].path),
                "--output",
                str(tmp_path / "r.html"),
                "--pdf",
            ]
        )
    assert (
        "neither is on the path" in capsys.readouterr().err
        and not (tmp_path / "r.html").exists()
    )


def test_a_report_opens_in_a_browser_without_a_network_or_a_complaint(
    runs, tmp_path, monkeypatch
):
    api = playwright()
    monkeypatch.setattr(sample_sections, "_METHOD", "PCA")
    first, second = (
        probed(runs[name], tmp_path / name)[0] for name in ("tiny", "vanilla")
    )
    for run in (first, second):
        share = {
            "share": 0.5,
            "interval": [0.4, 0.6],
            "count": 100,
            "own": 0.9,
            "chance": 0.1,
        }
        judged = {"recipe": {"step": 12, EVIL: EVIL}, "factors": {EVIL: share}}
        (run.path / "judged.json").write_text(json.dumps(judged))
    write_samples(first, torch.tensor([1, 2]), steps=2)
    document = run_report({EVIL: first, "B": second})
    assert "could not be made" not in document.html() and any(
        "Probe of the class" in line for line in document.parts[1]["lines"]
    )
    page = document.write(tmp_path / "out" / "report.html")
    with api.sync_playwright() as browsers:
        window = browsers.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for scheme, width in (("light", 1000), ("dark", 390)):
            tab = window.new_page(
                color_scheme=scheme,
                viewport={"width": width, "height": 800},
                offline=True,
            )
            said, asked = [], []
            tab.on("console", lambda message, said=said: said.append(message.text))
            tab.on("pageerror", lambda error, said=said: said.append(str(error)))
            tab.on(
                "dialog",
                lambda dialog, said=said: (said.append("a dialog"), dialog.dismiss()),
            )
            tab.on("request", lambda request, asked=asked: asked.append(request.url))
            tab.goto(page.as_uri())
            assert (
                said == []
                and asked[0] == page.as_uri()
                and all(url.startswith("data:") for url in asked[1:])
            )
            assert tab.evaluate("document.documentElement.scrollWidth") <= width, (
                "nothing but tables and figures is scrolled"
            )
            assert tab.evaluate(
                "[...document.images].every(image => image.naturalWidth > 50)"
            )
            assert tab.locator("h1").inner_text() == f"{EVIL} and B"
            for link in tab.locator("nav a").all():
                assert tab.locator(link.get_attribute("href")).count() == 1
        window.close()
    assert write_pdf(page).read_bytes()[:5] == b"%PDF-"


def test_samples_stay_with_their_run(runs):
    run = runs["vanilla"]
    images, file = write_samples(run, torch.tensor([1, 2, 3]), steps=3, seed=5)
    stored = load_file(file)
    assert torch.equal(stored["images"], images) and stored["labels"].tolist() == [
        1,
        2,
        3,
    ]
    assert torch.equal(
        images, run.sample(torch.tensor([1, 2, 3]), steps=3, seed=5)["image"]
    )
    assert not torch.equal(
        images, run.sample(torch.tensor([1, 2, 3]), steps=3, seed=6)["image"]
    )
    assert (
        file.parent == run.path / "samples"
        and file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    )
    before = file.read_bytes()
    others = {
        write_samples(run, torch.tensor(labels), steps=3, seed=seed)[1]
        for labels, seed in (([1, 2, 4], 5), ([1, 2], 5), ([1, 2, 3], 6))
    }
    assert len(others | {file}) == 4 and file.read_bytes() == before, (
        "other samples never replace these"
    )


def test_samples_do_not_depend_on_how_many_are_drawn_at_once(runs):
    labels = torch.arange(10)
    torch.testing.assert_close(
        runs["tiny"].sample(labels, steps=3, batch=3),
        runs["tiny"].sample(labels, steps=3),
    )


def probed(run, path, **few):
    shutil.copytree(run.path, path)
    run = Run.open(path)
    return run, write_probes(
        run,
        probe_run(
            run, levels=(0.0, 0.5), families=("regression",), strengths=(0.1,), **few
        ),
    )


def test_a_report_compares_probes_shows_baselines_and_flags_old_ones(runs, tmp_path):
    (first, _), (second, _) = (
        probed(runs[name], tmp_path / name) for name in ("tiny", "vanilla")
    )
    page = run_report({"A": first, "B": second}, sections=QUICK).html()
    assert (
        "B minus A" in page
        and "raw input" in page
        and "untrained network" in page
        and "not of its newest" not in page
    )
    stored = read_probes(first)
    write_probes(first, replace(stored, about={**stored.about, "step": 4}))
    page = run_report({"A": first, "B": second}, sections=QUICK).html()
    assert "The probes of A are of step 4, not of its newest checkpoint" in page


def test_probes_of_other_layers_stand_beside_each_other(runs, tmp_path):
    (first, _), (second, _) = (
        probed(runs["tiny"], tmp_path / "a"),
        probed(runs["vanilla"], tmp_path / "b", layers=(1, 4)),
    )
    page = run_report({"A": first, "B": second}, sections=QUICK).html()
    # two figures, alt and caption
    assert (
        page.count("Test score by block and noise level.") == 4
        and "Right: " not in page
    )


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
            "seed: 0 in the folder, 7 asked for",
        ),
        (["sample", "nowhere"], "holds no run"),
        (["sample", "tiny", "--labels", "10"], "no class 10: labels run from 0 to 9"),
        (["train", "--model.mlp-ratio", "-1"], "mlp_ratio is -1.0"),
        (["train", "--model.mlp-ratio", "nan"], "mlp_ratio is nan"),
        (["train", "--device", "meta"], "device 'meta' cannot be used here"),
        (["train", "--name", "a/b"], "'a/b' is no name for a run"),
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
def test_mistakes_are_answered_in_words(runs, monkeypatch, capsys, args, words):
    monkeypatch.chdir(runs["tiny"].path.parent)
    extra = ["--folder", "."] if args[0] == "train" else []
    with pytest.raises(SystemExit) as stop:
        main(args + extra)
    captured = capsys.readouterr()
    said = " ".join((captured.err + captured.out).split())
    assert stop.value.code == 2 and words in said and "Traceback" not in said
    assert sorted(p.name for p in Path().iterdir() if p.is_dir()) == [
        "tiny",
        "vanilla",
    ], "nothing was made"


def test_the_command_line_trains_what_it_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample_sections, "_METHOD", "PCA")
    main(
        [
            "train",
            "--name",
            "cli",
            "--folder",
            str(tmp_path),
            "--model.width",
            "16",
            "--model.depth",
            "4",
            "--model.heads",
            "2",
            "--training.steps",
            "3",
            "--training.batch",
            "8",
            "--objective.name",
            "flow_matching",
        ]
    )
    main(
        [
            "sample",
            str(tmp_path / "cli"),
            "--labels",
            "3",
            "--each",
            "2",
            "--steps",
            "2",
            "--cfg-scale",
            "2",
        ]
    )
    main(["report", str(tmp_path / "cli"), "--output", str(tmp_path / "r.html")])
    assert (
        len(
            list(
                (tmp_path / "cli/samples").glob(
                    "step-3-euler-2-cfg-2-seed-0-2-labels-*.png"
                )
            )
        )
        == 1
    )
    assert (tmp_path / "r.html").exists() and "3 steps" in capsys.readouterr().out
    (tmp_path / "cli/log.jsonl").unlink()  # not needed to go on
    main(
        [
            "train",
            "--name",
            "cli",
            "--folder",
            str(tmp_path),
            "--model.width",
            "16",
            "--model.depth",
            "4",
            "--model.heads",
            "2",
            "--training.steps",
            "3",
            "--training.batch",
            "8",
            "--objective.name",
            "flow_matching",
        ]
    )
    main(["report", str(tmp_path / "cli")])


def test_the_command_line_hands_features_to_repa(tmp_path, capsys):
    sources = Sources(Config().data)
    tokens = sources.take("digits", torch.arange(len(sources.data["digits"]))).x0
    save_file(
        {"features": tokens.mean(1), "other": tokens}, tmp_path / "pooled.safetensors"
    )
    save_file({"features": tokens[1:]}, tmp_path / "short.safetensors")
    assert torch.equal(read_features(tmp_path / "pooled.safetensors"), tokens.mean(1))
    command = [
        "train",
        "--name",
        "repa",
        "--folder",
        str(tmp_path / "runs"),
        "--model.width",
        "16",
        "--model.depth",
        "2",
        "--model.heads",
        "2",
        "--training.steps",
        "2",
        "--training.batch",
        "8",
        "--objective.name",
        "repa",
        "--features",
    ]
    with pytest.raises(SystemExit):
        main([*command, str(tmp_path / "short.safetensors")])
    assert (
        "features of 1077 samples, but 1078" in capsys.readouterr().err
        and not (tmp_path / "runs").exists()
    )
    main([*command, str(tmp_path / "pooled.safetensors")])
    run = Run.open(tmp_path / "runs/repa")
    assert run.state()["step"] == 2 and run.load("objective")[
        "projector.4.weight"
    ].shape == (4, 2048)
    assert run.log["rep_loss"].notna().all()


def test_the_command_line_samples_as_it_is_told(runs, tmp_path):
    shutil.copytree(runs["tiny"].path, tmp_path / "tiny")
    main(
        [
            "sample",
            str(tmp_path / "tiny"),
            "--labels",
            "3",
            "5",
            "--each",
            "2",
            "--steps",
            "3",
            "--method",
            "sde",
            "--seed",
            "4",
            "--cfg-scale",
            "1.5",
            "--shift",
            "2.5",
            "--interval",
            "0.1",
            "0.7",
        ]
    )
    (file,) = (tmp_path / "tiny/samples").glob("*.safetensors")
    assert file.name.startswith(
        "step-12-sde-3-shift-2.5-cfg-1.5-in-0.1-0.7-seed-4-4-labels-"
    )
    expected = runs["tiny"].sample(
        torch.tensor([3, 3, 5, 5]), 3, "sde", 1.5, 4, shift=2.5, interval=(0.1, 0.7)
    )["image"]
    assert torch.equal(load_file(file)["images"], expected)


def test_the_command_line_probes(runs, tmp_path, capsys):
    shutil.copytree(runs["tiny"].path, tmp_path / "tiny")
    main(["probe", str(tmp_path / "tiny"), "--samples", "200"])
    said = capsys.readouterr().out
    assert "raw input" in said and "untrained network" in said and "tiny, block" in said
    assert json.loads((tmp_path / "tiny/probes.json").read_text())["about"][
        "levels"
    ] == [0.0, 0.1, 0.25, 0.5, 0.75]


def test_a_notebook_runs_without_a_screen_and_keeps_its_progress_to_itself(
    tmp_path, capfd
):
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(
                "from tqdm.auto import tqdm\nfor _ in tqdm(range(3), desc='counting'): pass\nprint('done', 6 * 7)"
            )
        ]
    )
    nbformat.write(book, tmp_path / "in.ipynb")
    main(["notebook", str(tmp_path / "in.ipynb"), str(tmp_path / "out" / "out.ipynb")])
    (cell,) = nbformat.read(tmp_path / "out/out.ipynb", 4).cells
    assert [o.text for o in cell.outputs] == [
        "done 42\n"
    ] and "counting: 100%" in capfd.readouterr().err

    book.cells[0].source = "print('before')\nraise RuntimeError('in the cell')"
    nbformat.write(book, tmp_path / "bad.ipynb")
    with pytest.raises(SystemExit):
        main(["notebook", str(tmp_path / "bad.ipynb"), str(tmp_path / "bad_out.ipynb")])
    assert "in the cell" in capfd.readouterr().err
    assert "before" in (tmp_path / "bad_out.ipynb").read_text()


def test_the_installed_command_has_help_for_every_field():
    command = Path(sys.executable).with_name("selfflow")
    shown = subprocess.run(
        [command, "train", "--help"], capture_output=True, text=True, check=True
    ).stdout

    def words(text):
        return " ".join(re.findall(r"\w+", text))

    for part in (
        Config,
        DataConfig,
        ModelConfig,
        TransformerOptions,
        ObjectiveConfig,
        FeatureOptions,
        TrainConfig,
    ):
        lines = re.findall(r"^    (\w+): .+?  # (.+)$", inspect.getsource(part), re.M)
        assert lines
        for name, text in lines:
            if isinstance(part, Named) and name == "name":
                text = f"one of {', '.join(part.registry)}"
            assert words(name.replace("_", "-")) in words(shown) and words(
                text
            ) in words(shown), name
