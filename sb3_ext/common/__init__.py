"""Losses, storage, buffers and the gradient loop that the algorithms share."""
