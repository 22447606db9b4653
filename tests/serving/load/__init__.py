"""A server in a process of its own under load; each file is a program and has a short test.

python -m tests.serving.load.storm --seconds 300
"""
