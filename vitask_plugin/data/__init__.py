"""Labelled images in, LLaVA instruction data out."""
