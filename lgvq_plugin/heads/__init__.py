"""Trained modules of ours on top of the host's codes; none is needed at inference."""
