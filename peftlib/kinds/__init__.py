"""The adapter types, one a file; what several of them need of a module is in the files that begin with `_`."""
