"""A program that ends its process group once its standard input ends.

That is when the process that holds the other end has ended, however it did. No group of an engine and
its workers stays behind, then, even if Octavo is killed outright.
"""

import os
import signal
import sys
import time

# How a group is ended: signals, each with the seconds until the next. The last one is SIGKILL.
# Ctrl-C comes first because vLLM 0.32 waits for ever if it gets SIGTERM while it loads a model.
ESCALATION = ((signal.SIGINT, 20.0), (signal.SIGTERM, 10.0))


def main() -> None:
    for signum, _ in ESCALATION:
        signal.signal(signum, signal.SIG_IGN)
    sys.stdin.buffer.read()
    for signum, seconds in ESCALATION:
        os.killpg(0, signum)
        time.sleep(seconds)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
