"""Volume -> windowed slice stacks."""
