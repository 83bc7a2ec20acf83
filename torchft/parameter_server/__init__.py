"""DiLoCo for workers that come and go: the outer step at a server, over plain HTTP.

`rounds.py` decides when a round closes; everything around it carries bytes.
"""
