"""Token datasets: reading corpora, writing and opening ``.bin``/``.idx`` pairs."""
