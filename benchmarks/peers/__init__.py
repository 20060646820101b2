"""What people would pick instead of kvcc, each in a virtual environment and a process of its own."""
