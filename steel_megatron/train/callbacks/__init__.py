"""What happens next to training: metrics, the progress bar, and what users add."""

from steel_megatron.config import RunConfig
from steel_megatron.train.callbacks.base import Callback, CopyFirst, RunView
from steel_megatron.train.callbacks.bits_per_byte import BitsPerByte
from steel_megatron.train.callbacks.metrics import Metrics, TensorBoard
from steel_megatron.train.callbacks.progress import ProgressBar
from steel_megatron.train.callbacks.routing import RoutingMetrics

__all__ = ["Callback", "CopyFirst", "RunView", "callbacks_of"]


def callbacks_of(run: RunConfig) -> list[Callback]:
    """The callbacks that every run has, by its settings."""
    tensorboard = TensorBoard()
    own: list[Callback] = [tensorboard, Metrics(tensorboard), BitsPerByte(tensorboard), ProgressBar()]
    if run.training.routing_metrics_interval:
        own.append(RoutingMetrics(tensorboard, run.training.routing_metrics_interval))
    return own
