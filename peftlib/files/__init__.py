"""Adapter files: saved, loaded and checked."""
