"""Many requests to one model at once: what `tq serve` runs on."""
