"""GRPO: tasks with verifiable, graded rewards, group-relative advantages, and the loop."""
