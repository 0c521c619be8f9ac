"""Neighbours of this library, a file or folder each; none is imported before a model or a file asks for it."""
