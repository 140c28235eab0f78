"""Reward functions in verl's ``compute_score`` form, one file per task."""
