"""Matplotlib figures without global state: made, styled and encoded here.

Nothing imports ``matplotlib.pyplot``: figures are plain objects that belong to who made them, so
that several threads may draw at once and nothing has to be closed.
"""

import io

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eanet.report.page import Picture

__all__ = ["COLORS", "INK", "MUTED", "new_figure", "picture", "style_axes"]

#: the palette of Okabe and Ito, told apart with any kind of color vision; yellow is left out
#: because it is too light for lines on a light ground
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
#: text and axes
INK = "#1f2933"
#: what stands back: grids, ticks, raw values behind a smoothed line
MUTED = "#66727f"

#: screens with two device pixels per CSS pixel show a figure sharp
_PIXELS_PER_INCH = 192


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """Return an empty figure with a canvas that needs no display."""
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    figure.patch.set_alpha(0.0)  # the page decides what lies behind
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes, *, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """Give axes of a chart the look of the reports: two spines, a light grid, a title at the left.

    Args:
        axes: what to style.
        title: heading of the chart, as plain text.
        xlabel: name of the horizontal axis, with its unit.
        ylabel: name of the vertical axis, with its unit.
    """
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=8.5)
    axes.grid(visible=True, color=MUTED, alpha=0.2, linewidth=0.6)
    axes.set_axisbelow(True)
    # Names come from users; a dollar sign in one must not start a formula.
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, parse_math=False)
    axes.set_xlabel(xlabel, fontsize=9, color=INK, parse_math=False)
    axes.set_ylabel(ylabel, fontsize=9, color=INK, parse_math=False)


def picture(figure: Figure, caption: str, width_pixels: int | None = None) -> Picture:
    """Encode a figure as a picture of a page.

    Args:
        figure: what was drawn.
        caption: what it shows; also the text for those who cannot see it.
        width_pixels: largest width on the page; ``None`` for the full width.

    Returns:
        The PNG file, with two pixels per CSS pixel of the figure's size.
    """
    buffer = io.BytesIO()
    # no time and no version in the file, so that equal figures are equal bytes
    figure.savefig(buffer, format="png", dpi=_PIXELS_PER_INCH, metadata={"Software": None})
    return Picture(data=buffer.getvalue(), caption=caption, width_pixels=width_pixels)
