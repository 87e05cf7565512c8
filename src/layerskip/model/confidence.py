"""Classes of drafts by their probability: how likely a draft is accepted depends on its class."""

CONFIDENCE_CLASSES = 8


def confidence_class(confidence: float) -> int:
    """Class of a draft by its probability; classes are narrower at the upper end, where most drafts are."""
    if not confidence > 0:  # nor a number
        return 0
    return min(CONFIDENCE_CLASSES - 1, int(confidence * confidence * CONFIDENCE_CLASSES))
