"""The study's figures, drawn with matplotlib (study/requirements.txt)."""

import os

import numpy as np
from PIL import Image

from common.files import UserError, writing
from common.processes import say

DOTS_PER_INCH = 100
LATENT_PANEL_INCHES = (6.4, 5.6)


def figure_class():
    """matplotlib's Figure. It is imported here, so that only what draws needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "The study's figures are drawn with matplotlib, which is not installed; install it "
            "with `pip install -r study/requirements.txt`"
        ) from None
    return Figure


def is_available():
    """Whether figures can be drawn; says so if not."""
    try:
        figure_class()
    except UserError as error:
        say(f"note: {error}; no figure is drawn")
        return False
    return True


def new_chart(title, x_label):
    """A figure of 720 x 400 pixels with one pair of axes: (figure, axes)."""
    figure = figure_class()(figsize=(7.2, 4.0), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label)
    axes.grid(axis="y", color="lightgrey")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure, path):
    # Without the version of matplotlib in it, the same numbers give the same file.
    with writing(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def draw_curves(path, title, x_label, curves):
    """Draws a line through the means and a dot for every value. Both axes start at 0.

    curves: {label: (colour, {x: list of values})}
    """
    figure, axes = new_chart(title, x_label)
    positions = set()
    for label, (colour, values) in curves.items():
        means = [np.mean(values[x]) for x in values]
        axes.plot(list(values), means, color=colour, linewidth=2, label=label)
        for x in values:
            heights = values[x]
            axes.plot(
                [x] * len(heights), heights, "o", color=colour, fillstyle="none", markersize=5
            )
        positions.update(values)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted(positions))
    axes.legend(frameon=False)
    save(figure, path)


def draw_scatter(path, title, x_label, groups):
    """Draws a named dot for every point.

    groups: {label: (colour, list of (x, y, name))}
    """
    figure, axes = new_chart(title, x_label)
    for label, (colour, points) in groups.items():
        axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], 14, colour, label=label)
    axes.margins(x=0.08, y=0.08)
    axes.legend(frameon=False)
    fix_layout(figure)
    add_names(axes, groups, [axes.get_legend().get_window_extent()])
    save(figure, path)


def draw_panels(path, title, panels):
    """Draws panels, two in a row, with a named dot for every point and one legend for all.

    panels: list of (label of the x axis, {label of a group: (colour, list of (x, y, name))}); all
    have the same groups
    """
    rows = (len(panels) + 1) // 2
    figure = figure_class()(
        figsize=(14.4, 4.4 * rows + 0.6), dpi=DOTS_PER_INCH, layout="constrained"
    )
    figure.suptitle(title, fontsize=12)
    all_axes = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, (x_label, groups) in zip(all_axes, panels, strict=False):
        for label, (colour, points) in groups.items():
            axes.scatter(
                [x for x, _, _ in points], [y for _, y, _ in points], 20, colour, label=label
            )
        axes.set_xlabel(x_label)
        axes.grid(color="lightgrey")
        axes.set_axisbelow(True)
        axes.margins(x=0.08, y=0.08)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    fix_layout(figure)
    for axes, (_, groups) in zip(all_axes, panels, strict=False):
        add_names(axes, groups, [])
    save(figure, path)


def fix_layout(figure):
    """Lays the figure out for good: names are placed by their pixels, which a later layout would
    move."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


# Where the left end of a name may stand relative to its dot, in pixels, the nearest place first.
NAME_OFFSETS = [(dx, dy) for dx in range(-110, 71, 6) for dy in range(-75, 76, 5)]
NAME_OFFSETS.sort(key=lambda offset: np.hypot(offset[0] - 8, offset[1] + 5))


def add_names(axes, groups, taken):
    """Writes the name of every point of draw_scatter's `groups` at the nearest place where it
    covers no other name, no dot and none of the boxes `taken`; away from its dot a thin line joins
    them."""
    points = [(x, y, name, colour) for colour, found in groups.values() for x, y, name in found]
    dots = axes.transData.transform([point[:2] for point in points])
    taken = list(taken)
    for (x, y, name, colour), dot in zip(points, dots, strict=True):
        text = axes.annotate(name, dot, xycoords="figure pixels", fontsize=8, color=colour)
        box = text.get_window_extent().padded(3)
        offset = next(
            (o for o in NAME_OFFSETS if is_free(box.translated(*o), taken, dots, axes.bbox)),
            NAME_OFFSETS[0],
        )
        place = dot + offset
        text.set_position(place)
        taken.append(box.translated(*offset))
        if np.hypot(*offset) > 14:
            line = {"arrowstyle": "-", "color": "grey", "linewidth": 0.5}
            axes.annotate("", (x, y), place, textcoords="figure pixels", arrowprops=line, zorder=0)


def is_free(box, taken, dots, canvas):
    """Whether a box lies inside the canvas and covers none of the boxes `taken` and no dot (n,2),
    all in pixels."""
    inside = canvas.x0 <= box.x0 and box.x1 <= canvas.x1
    inside = inside and canvas.y0 <= box.y0 and box.y1 <= canvas.y1
    return inside and not box.count_overlaps(taken) and not box.count_contains(dots)


def draw_latents(path, panels, classes):
    """Draws a panel for each VAE with a dot for each picture, one colour per class.

    panels: list of (title, places (n,2), labels (n,), shares of the variance of the two axes (2,))
    classes: list of the classes' names
    """
    from matplotlib.colors import hsv_to_rgb

    width, height = LATENT_PANEL_INCHES
    figure = figure_class()(
        figsize=(width * len(panels), height), dpi=DOTS_PER_INCH, layout="constrained"
    )
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, places, labels, shares) in zip(all_axes, panels, strict=True):
        for number, name in enumerate(classes):
            chosen = places[labels == number]
            colour = hsv_to_rgb((number / len(classes), 1, 0.8))
            axes.scatter(chosen[:, 0], chosen[:, 1], 10, [colour], label=name, linewidths=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"first principal component, {shares[0]:.1%} of the variance")
        axes.set_ylabel(f"second principal component, {shares[1]:.1%}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save(figure, path)


# Of draw_card's figure.
CARD_INCHES = 10.0
STRIP_INCHES = 0.42
CARD_COLOURS = ("crimson", "navy", "darkorange", "teal", "purple", "black")


def draw_card(path, strips, pictures):
    """Draws a strip for each measure, better to the right: a dot for each VAE of the scale, the
    darker the smaller its distance, and a triangle for each VAE of the card. Below are pictures.

    strips: list of (title, whether higher is better, {VAE: value}, list of (value, distance) of the
    scale's VAEs). pictures: {VAE: path of a PNG}
    """
    heights = [STRIP_INCHES] * len(strips)
    drawn = {vae: Image.open(file) for vae, file in pictures.items()}
    width = CARD_INCHES / len(drawn)
    heights.append(0.5 + max(width * im.height / im.width for im in drawn.values()))
    figure = figure_class()(
        figsize=(CARD_INCHES, sum(heights) + 0.3), dpi=DOTS_PER_INCH, layout="constrained"
    )
    grid = figure.add_gridspec(len(heights), len(drawn), height_ratios=heights)
    for row, strip in enumerate(strips):
        draw_strip(figure.add_subplot(grid[row, :]), *strip)
    for column, (vae, picture) in enumerate(drawn.items()):
        axes = figure.add_subplot(grid[len(strips), column])
        axes.imshow(picture, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(
            f"{vae}: originals, reconstructions,\ninterpolations, neighbours", fontsize=8
        )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=4, fontsize=8, frameon=False)
    save(figure, path)


def draw_strip(axes, title, higher_is_better, own, others):
    """A strip of draw_card."""
    if others:
        values, distances = zip(*others, strict=True)
        axes.scatter(
            values,
            [0] * len(values),
            40,
            distances,
            cmap="viridis",
            alpha=0.8,
            linewidths=0,
            label="VAEs of the study (dark: samples close to real ones)",
        )
    for number, (vae, value) in enumerate(own.items()):
        colour = CARD_COLOURS[number % len(CARD_COLOURS)]
        axes.plot([value], [0.5], "v", color=colour, markersize=8, label=vae)
    axes.set_ylim(-0.5, 1)
    axes.set_yticks([])
    axes.margins(x=0.05)
    if not higher_is_better:
        axes.invert_xaxis()
    axes.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
    axes.tick_params(labelsize=7, length=2, pad=1)
    axes.spines[["top", "right", "left"]].set_visible(False)


def stack_pictures(paths, path):
    """Writes the pictures at `paths`, one above the other, to `path`. Returns whether all were
    there; if one is missing, nothing is written."""
    if not all(os.path.exists(p) for p in paths):
        return False
    gap = 16
    pictures = [Image.open(p) for p in paths]
    width = max(picture.width for picture in pictures)
    height = sum(picture.height + gap for picture in pictures)
    canvas = Image.new("RGB", (width, height), "white")
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height + gap
    with writing(path) as file:
        canvas.save(file, "PNG")
    return True
