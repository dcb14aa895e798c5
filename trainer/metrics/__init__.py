"""What a run reports: step metrics and their sinks, the first lines, the summary, the curves."""
