"""What a run has written to TensorBoard, as numbers and as a picture."""

from __future__ import annotations

from pathlib import Path

from steel_megatron.errors import DataError

Series = list[tuple[int, float]]


def read_scalars(tensorboard_dir: Path) -> dict[str, Series]:
    """All scalars of a TensorBoard folder: for each name, its (step, value) pairs in the order of steps.

    Raises:
        DataError: there is no log in the folder.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(tensorboard_dir), size_guidance={"scalars": 0})
    if not tensorboard_dir.is_dir() or not list(tensorboard_dir.glob("*tfevents*")):
        raise DataError(f"{tensorboard_dir} holds no TensorBoard log")
    events.Reload()
    return {
        name: sorted((event.step, event.value) for event in events.Scalars(name)) for name in events.Tags()["scalars"]
    }


def plot_loss(
    scalars: dict[str, Series], picture: Path, *, unigram_entropy: float | None = None, title: str = ""
) -> None:
    """Draw training and validation loss over steps into a PNG file.

    Args:
        scalars: from :func:`read_scalars`.
        picture: the file to write.
        unigram_entropy: nats per token that token frequencies alone would give; drawn as a line.
        title: stands over the picture.
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
