"""Adapters in a model: how one is put in, chosen, merged, shown and taken out; it knows no adapter type and no file."""
