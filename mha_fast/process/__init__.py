"""What the process has and has chosen: threads, instruction sets, advice."""
