"""What one vLLM worker holds, read off vLLM's own loader: HF tensors in, boxes and strided memory out."""
