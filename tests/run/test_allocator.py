"""The C library's habit, measured by page faults."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from llmrecipes.run.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory() == (sys.argv[2] == "works")
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(2**27)
before = faults()
for _ in range(4):
    bytearray(2**27)
print(faults() - before)
"""
PAGES = 4 * 2**27 // 4096


def faults(*words, **variables):
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | variables
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], env=env, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_large_memory_is_kept_and_not_faulted_in_again():
    assert faults("keep", "works") < PAGES / 100


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_mutant_without_the_setting_faults_every_time():
    assert faults("leave", "") > PAGES / 2


@pytest.mark.skipif(sys.platform != "linux", reason="the setting is glibc's")
def test_what_the_user_set_stands():
    assert faults("keep", "refused", MALLOC_TRIM_THRESHOLD_="131072") > PAGES / 2
