"""Plots the agreement of each exit with the last layer."""

from collections.abc import Sequence
from pathlib import Path

from layerskip.evaluation.inspect.exits import ExitQuality

PLOT_FILE = "agreement.png"


def plot_agreement(exits: Sequence[ExitQuality], output: Path) -> Path | None:
    """Draw agreement and loss of every exit into `output/agreement.png`.

    Args:
        exits: Qualities, in order.
        output: An existing folder.

    Returns:
        The file; None if matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    layers = [quality.exit_layer for quality in exits]
    figure = Figure(figsize=(7, 4), layout="constrained")
    agreement = figure.add_subplot()
    agreement.plot(layers, [quality.agreement for quality in exits], "o-", color="tab:blue", label="agreement")
    agreement.set(
        xlabel="exit layer", ylabel="agreement with the last layer", ylim=(0, 1.02), xlim=(0.5, len(exits) + 0.5)
    )
    agreement.grid(alpha=0.3)
    loss = agreement.twinx()
    loss.plot(layers, [quality.loss for quality in exits], "s--", color="tab:orange", label="loss")
    loss.set_ylabel("loss (nats a token)")
    figure.legend(loc="outside upper center", ncols=2)
    path = output / PLOT_FILE
    figure.savefig(path, dpi=120)
    return path
