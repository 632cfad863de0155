"""Will a model fit, how fast can it be at best, and what to do if not: from headers alone, no weight is read."""
