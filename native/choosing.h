// Passes that end with tokens: the token after each of a block, and drafts, each from the one before.
#pragma once

#include <cstdint>

#include "interface.h"

namespace layerskip {

void choose(const ChooseCall& call);

// Returns -1 where a logit isn't finite, else 0.
int32_t draft(const DraftCall& call);

}  // namespace layerskip
