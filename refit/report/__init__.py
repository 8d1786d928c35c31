"""The page about a run: read from the run folder, drawn by plotly, one file that asks nobody for anything."""
