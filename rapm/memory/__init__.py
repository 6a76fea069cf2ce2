"""What a slot costs, which plan fits a budget, and what the plan does: keep, recompute, checkpoint, offload."""
