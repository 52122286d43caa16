"""Each folder answers one question; `python -m experiments` lists the commands."""
