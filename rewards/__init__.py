"""Verifiable rewards for MOAKS grading and 3D boxes. numpy only: importing it needs no torch."""
