"""The trainers: the only code that imports Megatron."""
