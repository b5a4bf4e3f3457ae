"""Speed and memory against other libraries on the same work; see docs/performance.md."""
