"""What an engine runs and holds while it serves: its configuration, its memory, audits and reads of it."""
