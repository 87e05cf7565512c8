"""Which policy plans the rounds of a request: what its generation strategy means."""

from layerskip.decoding.adaptive.experience import Experience
from layerskip.decoding.config import GenerationConfig
from layerskip.decoding.policy import UNLIMITED, FixedPolicy, Plan, Policy
from layerskip.decoding.request import choose_exit_layer
from layerskip.model.decoder import Decoder


def make_policy(config: GenerationConfig, decoder: Decoder, experience: Experience) -> Policy | None:
    """The policy that a config asks for; None where every row takes one step after the other."""
    match config.strategy:
        case "autoregressive" | "early_exit":
            return None
        case "adaptive":
            return experience.policy(exit_layer=config.exit_layer, most_drafts=config.num_speculations)
        case "ngram":
            return FixedPolicy(fixed=Plan(source="text", num_speculations=config.draft_length))
        case _:
            exit_layer = choose_exit_layer(config, decoder)
            length = config.draft_length
            plan = Plan(source="layers", exit_layer=exit_layer, num_speculations=length, lease=UNLIMITED)
            return FixedPolicy(fixed=plan)
