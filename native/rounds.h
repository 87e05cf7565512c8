// Whole rounds, one after the other: drafts, their verification, acceptance, and the lengths that follow from it.
#pragma once

#include <cstdint>

#include "interface.h"

namespace layerskip {

// Returns the number of rounds; -1 where a logit of the first round's drafts isn't finite. `Team::in_use` is locked for
// each round, so that other threads compute in between.
int32_t rounds(const RoundsCall& call);

}  // namespace layerskip
