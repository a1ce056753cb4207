"""Logs of the DQN Replay Dataset's format: written, read, and converted to Minari datasets."""
