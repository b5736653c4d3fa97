"""The TensorBoard log of a run as numbers and as a plot."""

from __future__ import annotations

from pathlib import Path

from steel_megatron.errors import DataError

Series = list[tuple[int, float]]


def read_scalars(tensorboard_dir: Path) -> dict[str, Series]:
    """Read all scalars of a TensorBoard folder: (step, value) pairs by name, ordered by step.

    Raises:
        DataError: the folder has no log.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(tensorboard_dir), size_guidance={"scalars": 0})
    if not tensorboard_dir.is_dir() or not list(tensorboard_dir.glob("*tfevents*")):
        raise DataError(f"{tensorboard_dir} has no TensorBoard log")
    events.Reload()
    return {
        name: sorted((event.step, event.value) for event in events.Scalars(name)) for name in events.Tags()["scalars"]
    }


def plot_loss(
    scalars: dict[str, Series], picture: Path, *, unigram_entropy: float | None = None, title: str = ""
) -> None:
    """Plot training and validation loss over steps to a PNG file.

    Args:
        scalars: from :func:`read_scalars`.
        picture: PNG file to write.
        unigram_entropy: loss of a model that knows only token frequencies, in nats per token; drawn as a line.
        title: title of the plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for prefix, label, style in (("train/loss", "training", "-"), ("validation/loss", "validation", "o-")):
        for name, series in scalars.items():
            if name.startswith(prefix):
                axes.plot(*zip(*series, strict=True), style, label=label, linewidth=1.2, markersize=4)
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, linestyle="--", color="grey", linewidth=1, label="unigram entropy")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(title)
    axes.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
