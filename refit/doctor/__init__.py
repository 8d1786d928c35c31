"""Is this machine fit for a job? Checks that read files and ask the kernel; the standard library only.

A broken environment must be able to say so: no framework is imported, and a check that fails itself is reported.
"""
