"""How a program ends: with its code, when all that was registered is done, before Python takes itself apart."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys, threading, time
from meamtm.screen import end_at_once

class Late:
    def __del__(self):
        print("taken apart")

late = Late()

def main():
    atexit.register(print, "registered")
    threading.Thread(target=lambda: (time.sleep(0.3), print("a thread's work"))).start()
    {}

end_at_once(main)
"""


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit('what is wrong')", 1, "what is wrong"),
        ("raise ValueError('unforeseen')", 1, "ValueError: unforeseen"),
    ],
)
def test_a_program_ends_with_its_code_when_all_is_done(ending: str, code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(ending)], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stdout.splitlines() == ["a thread's work", "registered"]
    assert done.stderr.strip().endswith(said)
