"""One program per case: what is timed, and nothing else. Each runs in a process and an environment of its own."""
