"""Runs at full size: the command line, presets, hardware, checkpoints, images, provenance."""
