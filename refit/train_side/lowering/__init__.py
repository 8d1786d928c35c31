"""A live Megatron model as holdings of HF tensors: which rows of a local parameter are which rows of which tensor."""
