"""Training exit adapters: small blocks at early exits of a model that stays as it is."""
