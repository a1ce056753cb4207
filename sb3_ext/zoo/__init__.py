"""The command line `sb3x`."""
