"""Readers of the released 3DReasonKnee layout, and the phantom that writes it."""
