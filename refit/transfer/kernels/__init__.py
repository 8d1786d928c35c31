"""Pack, unpack, cast and digest of a whole bucket in one call: Triton on CUDA, torch elsewhere, the same bits.

`table` turns the boxes of a bucket into descriptor tables once; `triton_bucket` runs a table in one launch;
`reference` does the same with torch views, and is what the kernels are tested against.
"""
