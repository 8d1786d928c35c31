"""Quantized formats: codecs that work on any piece of a matrix, and trainers' memory seen through them.

`formats` says what a format makes of a tensor; `fp8`, `mxfp8` and `nvfp4` are the codecs; `codecs` finds one by name.
Pure torch, on the device of what they are given.
"""
