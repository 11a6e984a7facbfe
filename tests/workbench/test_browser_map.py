"""In a real browser, hovering over the map shows a sample, and a box gives indices."""

from browser import run_all, shoot, write_notebook

CELL = """
import torch
from selfflow.workbench.map_explorer import explore_map, previews_of
from selfflow.data.shapes import Shapes
examples = Shapes("test", size=16).take(torch.arange(9))
places = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))
factors = {name: examples.factors[name] for name in ("kind", "x")}
captions = ["<img src=x onerror=alert(1)>"] + list(examples.captions[1:])
previews = previews_of({"image": examples.signals["image"]})
found = explore_map(places, previews, factors, captions=captions)
found
"""


def test_hover_shows_the_sample_and_a_box_gives_back_indices(lab, page):
    page.set_viewport_size({"width": 1280, "height": 1000})
    write_notebook(lab, "map", CELL)
    run_all(page, lab, "map")
    points = page.locator(".scatterlayer .point")
    points.first.wait_for(timeout=120_000)
    box = page.locator(".plotly .nsewdrag").first.bounding_box()
    for point in range(points.count()):
        where = points.nth(point).bounding_box()
        page.mouse.move(
            where["x"] + where["width"] / 2, where["y"] + where["height"] / 2, steps=3
        )
        text = f"{point}: {'<img' if point == 0 else 'a '}"
        page.locator(".widget-html", has_text=text).first.wait_for(timeout=20_000)
    shoot(page, "map")
    assert page.locator("img[src='x']").count() == 0, "a caption stays text"
    page.locator(".modebar-btn[data-val='select']").first.click()
    page.mouse.move(box["x"] + 2, box["y"] + 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2, steps=10)
    page.mouse.up()
    page.locator("[role=status]", has_text="9 chosen").wait_for(timeout=20_000)
    shoot(page, "map-chosen")
