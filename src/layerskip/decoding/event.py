"""What a step of the engine tells of a row."""

from dataclasses import dataclass

from layerskip.decoding.policy import DrafterName
from layerskip.decoding.row import Row
from layerskip.decoding.rules.logprobs import TokenLogprobs


@dataclass(kw_only=True)
class Event:
    """Tokens that a row has gained: first accepted drafts, then the target's own token; or those of several steps."""

    row: Row
    tokens: tuple[int, ...]
    num_accepted: int = 0
    drafts: tuple[int, ...] = ()
    """The drafts that were verified."""
    drafter: DrafterName | None = None
    """What drafted them; `grammar` where a constraint alone did."""
    exit_layer: int = 0
    """The exit at which layers drafted; 0 where none did."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the tokens, if the request asks for them."""
    more: bool = False
    """Whether another event of the same step goes on with the row."""

    @property
    def ends(self) -> bool:
        """Whether the row has ended, and this is the last that comes of it."""
        return self.row.finish_reason is not None and not self.more
