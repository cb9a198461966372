"""Loops compiled for the CPU, which quantize a weight in one pass."""
