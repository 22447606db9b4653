"""``mtk bench families``: every family learns a text, in layouts, and resumes bit for bit."""
