"""Transforms of observations, actions and rewards: one description for recorded data and for environments."""
