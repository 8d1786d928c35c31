"""Trainers with LoRA adapters: made alike in every layout, trained with one collective, refitted merged or alone."""
