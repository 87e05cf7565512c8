"""Seconds of work on a device."""

import time

import torch

from layerskip.model.stopwatch import Stopwatch


def test_seconds_between_marks() -> None:
    watch = Stopwatch(torch.device("cpu"))
    start = watch.mark()
    time.sleep(0.02)
    assert 0.015 < watch.between(start, watch.mark()) < 1
