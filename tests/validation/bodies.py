"""What processes of a pool do in tests. Imports nothing heavy: the parent loads it."""

import os
import signal
import time


def load_nothing():
    """A preload."""


def fail_to_load():
    raise RuntimeError("no such framework")


def double(tell, value):
    tell("doubling")
    return 2 * value


def refuse(tell):
    tell("counting")
    raise ValueError("three is not two")


def die(tell):
    tell("dying")
    os.kill(os.getpid(), signal.SIGKILL)


def hang(tell, pid_file):
    pid_file.write_text(str(os.getpid()))
    tell("hanging")
    time.sleep(600)
