"""The one gate that every configuration passes before anything starts: `check`, and a file per kind of rule."""
