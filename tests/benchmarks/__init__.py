"""Speed, measured and never asserted: two things in one run, interleaved, as the ratio of medians."""
