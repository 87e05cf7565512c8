"""Why adaptive decoding chose what it chose, and why there is little speedup where there is little."""

from dataclasses import dataclass

from layerskip.decoding.adaptive.policy import AdaptivePolicy
from layerskip.decoding.policy import Plan

USUAL_DRAFTS = 4
"""Drafts for which costs are compared."""
GOOD_GAIN = 1.15
"""Predicted speedup from which nothing needs an explanation."""


@dataclass(frozen=True, kw_only=True)
class ExitOutlook:
    """What one exit promises."""

    exit_layer: int
    acceptance: float
    """Probability that the next draft is accepted, as seen so far."""
    needed: float
    """Acceptance from which it is faster than decoding without drafts."""
    num_speculations: int
    """The best draft length for this acceptance."""
    speedup: float
    """Predicted, with that length, against decoding without drafts."""
    rounds: int
    """Rounds in which it drafted."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What the policy saw and did."""

    rounds: dict[str, int]
    """By source of the drafts: `layers`, `text` or `none`."""
    exits: list[ExitOutlook]
    step_ms: float
    """An autoregressive step."""
    draft_layer_share: float
    """Part of a draft's time that goes to layers, at the best exit; the rest goes to the head."""
    verification_ratio: float
    """Milliseconds of verifying four drafts with all layers over those of a step."""
    reasons: list[str]
    """Sentences for people."""


def explain(policy: AdaptivePolicy) -> Explanation:
    """Look at a policy after a generation."""
    exits = [_outlook(policy, exit_layer) for exit_layer in policy.exits]
    best = max(exits, key=lambda outlook: outlook.speedup, default=None)
    costs = policy.times.costs
    depth = best.exit_layer if best is not None else 1
    layers = depth * costs.draft_layer
    ratio = costs.verification(0, min(USUAL_DRAFTS, costs.most_drafts)) / costs.step()
    rounds = {
        source: sum(count for (who, _), count in policy.counts.items() if who == source)
        for source in ("layers", "text", "none")
    }
    share = layers / max(layers + costs.draft_head, 1e-12)
    return Explanation(
        rounds=rounds,
        exits=exits,
        step_ms=1e3 * costs.step(),
        draft_layer_share=share,
        verification_ratio=ratio,
        reasons=_reasons(policy, best, rounds, share, ratio),
    )


def _outlook(policy: AdaptivePolicy, exit_layer: int) -> ExitOutlook:
    rate = policy.rates_of(exit_layer)
    length, speedup = _best_length(policy, exit_layer, rate)
    needed = next((r / 100 for r in range(101) if _best_length(policy, exit_layer, r / 100)[1] > 1.0), 1.0)
    return ExitOutlook(
        exit_layer=exit_layer,
        acceptance=rate,
        needed=needed,
        num_speculations=length,
        speedup=speedup,
        rounds=policy.counts["layers", exit_layer],
    )


def _best_length(policy: AdaptivePolicy, exit_layer: int, rate: float) -> tuple[int, float]:
    """The draft length with the highest predicted speedup, and that."""
    step = policy.seconds(Plan(source="none"))
    found = {}
    for drafts in range(1, policy.most_drafts + 1):
        tokens = sum(rate**i for i in range(drafts + 1))
        plan = Plan(source="layers", exit_layer=exit_layer, num_speculations=drafts)
        found[drafts] = tokens * step / policy.seconds(plan)
    length = max(found, key=found.__getitem__, default=0)
    return length, found.get(length, 0.0)


def _reasons(
    policy: AdaptivePolicy, best: ExitOutlook | None, rounds: dict[str, int], share: float, ratio: float
) -> list[str]:
    if best is None:
        return ["The model has a single layer: there is no early exit to draft with."]
    total = sum(rounds.values())
    main = max(rounds, key=rounds.__getitem__)
    words = {
        "layers": f"drafts by the first layers (mostly {_favourite(policy)} of {policy.times.costs.num_layers})",
        "text": "drafts taken from the text itself",
        "none": "no drafts",
    }
    reasons = [f"{rounds[main]} of {total} rounds had {words[main]}: that promised the most tokens a second."]
    if best.speedup >= GOOD_GAIN or main == "text":
        return reasons
    reasons.append(
        f"The best exit, {best.exit_layer}, is right {best.acceptance:.0%} of the time; "
        f"it pays from {best.needed:.0%} on."
    )
    if best.acceptance < 0.35:
        reasons.append(
            "So low an agreement means that the model wasn't trained for early exit: take a LayerSkip checkpoint, or "
            "train it (layerskip train)."
        )
    if share < 0.5:
        reasons.append(
            f"The head takes {1 - share:.0%} of a draft's time: --draft-vocabulary or --quantize-draft shorten that."
        )
    if ratio > 2:
        reasons.append(
            f"Verifying {USUAL_DRAFTS} drafts takes {ratio:.1f} times a step: so many tokens at once are bound by "
            "arithmetic here, not by memory. A smaller batch gains more."
        )
    return reasons


def _favourite(policy: AdaptivePolicy) -> int:
    return max(policy.exits, key=lambda exit_layer: policy.counts["layers", exit_layer])
