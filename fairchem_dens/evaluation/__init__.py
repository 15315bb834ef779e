"""Scores of a checkpoint on labelled data, by the metrics of the leaderboards, beside the paper's.

``metrics`` and ``paper`` are numbers; ``splits`` says what is scored and in which units; ``s2ef`` and
``is2re`` score it; ``scorecard``, ``report`` and ``parity_plot`` are what comes out.
"""
