"""A user's own panel, registered under a name."""

import ipywidgets as widgets

from selfflow import register_explorer


@register_explorer("Name of the run")
def name(chosen):
    "Says <which> run it was given."
    return widgets.HTML(chosen.run.config.name)
